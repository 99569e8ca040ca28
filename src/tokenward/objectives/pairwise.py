"""Objectives over pairs: DPO, SimPO and SePO, thin over the formulas of ``tokenward.ops``."""

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.objectives.base import Losses
from tokenward.ops.losses import dpo, ipo, margin_logistic
from tokenward.ops.ragged import segment_sum, weighted_sum
from tokenward.tokens.rows import TokenBatch

Normaliser = Literal["selected", "rate", "length", "none"]


class Sides(NamedTuple):
    """The same quantity for the preferred and the other response.  [b] each"""

    chosen: Tensor
    rejected: Tensor


def sides(per_response: Tensor) -> Sides:
    """Split values of responses that lie better, other, better, other.  [2 b] -> [b], [b]"""
    return Sides(per_response[0::2], per_response[1::2])


def _positive(name: str, value: float, example: float) -> None:
    if not value > 0:
        raise UserError(f"{name} must be greater than 0, got {value}. Write for example {name}: {example}.")


@dataclass(frozen=True, slots=True)
class DPO:
    """Direct preference optimisation over the weighted tokens (arXiv 2305.18290, Eq. 7).

    Attributes:
        beta: Scale of the implicit reward.
        label_smoothing: Assumed share of flipped labels (cDPO), sigmoid loss only.
        loss: ``sigmoid``, or ``ipo`` (arXiv 2310.12036) with mean log-ratios, as TRL has it.
    """

    needs_reference: ClassVar[bool] = True
    pairwise: ClassVar[bool] = True

    _: KW_ONLY
    beta: float = 0.1
    label_smoothing: float = 0.0
    loss: Literal["sigmoid", "ipo"] = "sigmoid"

    def __post_init__(self) -> None:
        _positive("beta", self.beta, 0.1)
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(
                f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}: at 0.5 no label is left."
            )
        if self.loss == "ipo" and self.label_smoothing:
            raise UserError("label_smoothing has no meaning with loss: ipo. Leave one of the two out.")

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch of pairs; see :class:`tokenward.objectives.base.Objective`."""
        assert batch.reference_logp is not None
        ratio = weighted_sum(logp - batch.reference_logp, batch.weights, batch.response, batch.responses)
        if self.loss == "ipo":
            total = segment_sum(batch.weights, batch.response, batch.responses)
            loss = ipo(*sides(ratio / total), beta=self.beta)
        else:
            loss = dpo(*sides(ratio), beta=self.beta, label_smoothing=self.label_smoothing)
        rewards = sides(self.beta * ratio.detach())
        return Losses(loss, _reward_metrics(rewards) | _logp_metrics(logp, batch))


@dataclass(frozen=True, slots=True)
class SePO:
    """Selective preference optimisation (arXiv 2408.13518, objective of section 3).

    ``-log sigma(u_w - u_l - margin)`` with ``u = gamma / z * sum_t w_t log pi(y_t)``, where ``w`` is 1 for
    the selected tokens and ``z`` the normaliser. With every token selected it is SimPO.

    Attributes:
        gamma: Scale; the paper searches 2.1 to 2.5, the published code uses 1.
        margin: The paper's lambda; 0 in the published code.
        normaliser: ``selected``: the sum of the weights; ``rate``: length times the side's rate, as the
            paper's formula has it; ``length``: all tokens of the response; ``none``: 1.
        chosen_rate: Rate of the chosen side, for ``normaliser: rate``.
        rejected_rate: Rate of the rejected side, for ``normaliser: rate``.
        profile: ``official`` sets the published code's values: gamma 1, margin 0, selected.
    """

    needs_reference: ClassVar[bool] = False
    pairwise: ClassVar[bool] = True

    _: KW_ONLY
    gamma: float = 2.0
    margin: float = 0.0
    normaliser: Normaliser = "selected"
    chosen_rate: float | None = None
    rejected_rate: float | None = None
    profile: Literal["official"] | None = None

    def __post_init__(self) -> None:
        _positive("gamma", self.gamma, 2.0)
        rates = (self.chosen_rate, self.rejected_rate)
        if self.normaliser == "rate" and not all(rate is not None and 0 < rate <= 1 for rate in rates):
            raise UserError(
                f"normaliser: rate needs chosen_rate and rejected_rate in (0, 1], got {rates[0]} and {rates[1]}. Write "
                "the two fractions of the selection, or normaliser: selected."
            )
        if self.profile == "official" and (self.gamma, self.margin, self.normaliser) != (
            2.0,
            0.0,
            "selected",
        ):
            raise UserError(
                "profile: official fixes gamma 1, margin 0 and normaliser selected, as the published code has them. "
                "Leave gamma, margin and normaliser out, or leave the profile out."
            )

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch of pairs; see :class:`tokenward.objectives.base.Objective`."""
        gamma = 1.0 if self.profile == "official" else self.gamma
        total = weighted_sum(logp, batch.weights, batch.response, batch.responses)
        mean = sides(total / self._normaliser(batch))
        loss = margin_logistic(*mean, scale=gamma, margin=self.margin)
        rewards = Sides(gamma * mean.chosen.detach(), gamma * mean.rejected.detach())
        return Losses(loss, _reward_metrics(rewards) | _logp_metrics(logp, batch))

    def _normaliser(self, batch: TokenBatch) -> Tensor:
        if self.normaliser == "selected":
            return segment_sum(batch.weights, batch.response, batch.responses)
        if self.normaliser == "none":
            return torch.ones_like(batch.rank, dtype=torch.float32)
        lengths = segment_sum(torch.ones_like(batch.weights), batch.response, batch.responses)
        if self.normaliser == "length":
            return lengths
        rates = lengths.new_tensor([self.chosen_rate, self.rejected_rate])
        return lengths * rates.repeat(batch.comparisons)


@dataclass(frozen=True, slots=True)
class SimPO:
    """Simple preference optimisation (arXiv 2405.14734, Eq. 6) over the weighted tokens.

    Attributes:
        beta: Scale of the mean log-probability.
        gamma: Target margin. TRL calls it ``simpo_gamma``; the SimPO code gives the ratio ``gamma / beta``.
    """

    needs_reference: ClassVar[bool] = False
    pairwise: ClassVar[bool] = True

    _: KW_ONLY
    beta: float = 2.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        _positive("beta", self.beta, 2.0)

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch of pairs; see :class:`tokenward.objectives.base.Objective`."""
        return SePO(gamma=self.beta, margin=self.gamma)(logp, batch)


def _reward_metrics(rewards: Sides) -> dict[str, Tensor]:
    margins = rewards.chosen - rewards.rejected
    return {
        "rewards/chosen": rewards.chosen,
        "rewards/rejected": rewards.rejected,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).float(),
    }


def _logp_metrics(logp: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
    """Sums over the tokens that have weight, how many of the tokens have it, and what training did to the chosen ones.

    ``logps/chosen_change_per_token`` is there where the batch has reference values.
    """
    logp = logp.detach()
    total = sides(weighted_sum(logp, batch.weights, batch.response, batch.responses))
    weight = sides(segment_sum(batch.weights, batch.response, batch.responses))
    kept = sides(segment_sum((batch.weights != 0).float(), batch.response, batch.responses))
    lengths = sides(segment_sum(torch.ones_like(batch.weights), batch.response, batch.responses))
    metrics = {
        "logps/chosen": total.chosen,
        "logps/rejected": total.rejected,
        "logps/chosen_per_token": _per_weight(total.chosen, weight.chosen),
        "kept/chosen": kept.chosen / lengths.chosen,
        "kept/rejected": kept.rejected / lengths.rejected,
    }
    if batch.reference_logp is not None:
        change = weighted_sum(logp - batch.reference_logp, batch.weights, batch.response, batch.responses)
        metrics["logps/chosen_change_per_token"] = _per_weight(sides(change).chosen, weight.chosen)
    return metrics


def _per_weight(total: Tensor, weight: Tensor) -> Tensor:
    """A weighted mean; 0 where nothing has weight, as one such pair must not spoil the mean over all."""
    return torch.where(weight != 0, total / weight, 0.0)
