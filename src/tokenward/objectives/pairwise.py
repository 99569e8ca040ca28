"""Objectives over pairs: one family, with DPO, IPO, SimPO and SePO as settings of it."""

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.objectives.base import Losses
from tokenward.ops import links
from tokenward.ops.links import log_odds
from tokenward.ops.losses import ipo, margin_logistic, orpo, pairwise
from tokenward.ops.ragged import segment_sum, weighted_sum
from tokenward.tokens.batches import Needs, TokenBatch


class PairSides(NamedTuple):
    """The same quantity for the preferred and the other response.  [b] each"""

    chosen: Tensor
    rejected: Tensor


def sides(per_response: Tensor) -> PairSides:
    """Split values of responses that lie better, other, better, other.  [2 b] -> [b], [b]"""
    return PairSides(per_response[0::2], per_response[1::2])


def positive(name: str, value: float, example: float) -> None:
    """Refuse a setting that is not greater than 0."""
    if not value > 0:
        raise UserError(f"{name} must be greater than 0, got {value}. Write for example {name}: {example}.")


def log_ratios(logp: Tensor, batch: TokenBatch) -> Tensor:
    """``log pi - log pi_ref`` of each token.  -> [n]"""
    assert batch.reference_logp is not None
    return logp - batch.reference_logp


def sums(values: Tensor, batch: TokenBatch) -> Tensor:
    """Weighted sum over each response.  [n] -> [r]"""
    return weighted_sum(values, batch.weights, batch.response, batch.responses)


def divergences(batch: TokenBatch) -> Tensor:
    """KL divergence of each response: the sum over its tokens, each by the size of its weight.  -> [r]"""
    return weighted_sum(batch.statistics["kl"], batch.weights.abs(), batch.response, batch.responses)


LinkName = Literal["logistic", "hinge", "robust", "kliep", "lsif", "ba", "sba"]


@dataclass(frozen=True, slots=True)
class Link:
    """A loss of the margin ``z`` by which the preferred side leads; see :mod:`tokenward.ops.links`.

    Attributes:
        name: ``logistic`` (DPO), ``hinge``, ``robust`` (unbiased under flipped labels), or of the Bregman family
            ``kliep``, ``lsif``, ``ba``, ``sba``; logistic is in it too.
        label_smoothing: Assumed share ``e`` of flipped labels; of all but ``robust``, ``(1 - e) L(z) + e L(-z)``.
        power: The lambda of ``ba`` and ``sba``.
        scale: The s of ``sba``.
    """

    _: KW_ONLY
    name: LinkName = "logistic"
    label_smoothing: float = 0.0
    power: float = 0.0
    scale: float = 4.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(
                f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}: at 0.5 no label is left."
            )
        if not (self.power >= 0 and self.scale > 0):
            raise UserError(
                f"a Bregman link needs power >= 0 and scale > 0, got {self.power} and {self.scale}. Write power: 0.0, scale: 4.0."
            )

    def __call__(self, margin: Tensor) -> Tensor:
        """The loss.  [...] -> [...]"""
        if self.name == "robust":
            return links.robust(margin, self.label_smoothing)
        plain: dict[str, links.Link] = {
            "logistic": links.logistic,
            "hinge": links.hinge,
            "kliep": links.kliep,
            "lsif": links.lsif,
            "ba": lambda z: links.basu(z, self.power),
            "sba": lambda z: links.scaled_basu(z, self.power, self.scale),
        }
        return links.smoothed(plain[self.name], margin, self.label_smoothing)


def reward_metrics(rewards: PairSides) -> dict[str, Tensor]:
    """Of both sides' rewards, without gradient."""
    rewards = PairSides(*(side.detach() for side in rewards))
    margins = rewards.chosen - rewards.rejected
    return {
        "rewards/chosen": rewards.chosen,
        "rewards/rejected": rewards.rejected,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).float(),
    }


def logp_metrics(logp: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
    """Sums over the tokens that have weight, how many of the tokens have it, and what training did to the chosen ones.

    ``logps/chosen_change_per_token`` is there where the batch has reference values.
    """
    logp = logp.detach()
    total = sides(sums(logp, batch))
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
        change = sums(logp - batch.reference_logp, batch)
        metrics["logps/chosen_change_per_token"] = _per_weight(sides(change).chosen, weight.chosen)
    return metrics


def kl_metrics(batch: TokenBatch) -> dict[str, Tensor]:
    """KL divergence to the reference of both sides, summed over the tokens that have weight."""
    kl = sides(divergences(batch).detach())
    return {"kl/chosen": kl.chosen, "kl/rejected": kl.rejected}


def _per_weight(total: Tensor, weight: Tensor) -> Tensor:
    """A weighted mean; 0 where nothing has weight, as one such pair must not spoil the mean over all."""
    return torch.where(weight != 0, total / weight, 0.0)


Normaliser = Literal["selected", "rate", "length", "none"]


@dataclass(frozen=True, slots=True)
class Pairwise:
    """``link(beta (u_w - u_l) - margin)``, with ``u`` the weighted log-ratios, or log-probabilities, of a response.

    Weights may be negative: such a token counts for the other side.

    Attributes:
        link: ``logistic``, ``hinge``, ``robust``, ``kliep``, ``lsif``, ``ba``, ``sba``: see
            :class:`tokenward.objectives.pairwise.Link`. ``ipo`` is ``(u_w - u_l - 1 / (2 beta))^2``; ``odds`` the
            logistic of the log-odds ratio of the responses' mean probabilities per token (ORPO's).
        beta: Scale.
        margin: What the scaled difference must exceed; not of ``ipo``.
        label_smoothing: Assumed share of flipped labels.
        reference: Whether ``u`` is of log-ratios to the reference.
        aggregate: ``sum`` over the tokens; ``mean``: over the sum of the weights' sizes; ``length``: over all
            tokens of the response, with and without weight.
        power: The lambda of ``ba`` and ``sba``.
        scale: The s of ``sba``.
    """

    _: KW_ONLY
    link: Literal["logistic", "hinge", "robust", "ipo", "odds", "kliep", "lsif", "ba", "sba"] = "logistic"
    beta: float = 0.1
    margin: float = 0.0
    label_smoothing: float = 0.0
    reference: bool = True
    aggregate: Literal["sum", "mean", "length"] = "sum"
    power: float = 0.0
    scale: float = 4.0

    def __post_init__(self) -> None:
        positive("beta", self.beta, 0.1)
        self._loss_of_margin()
        if self.link == "ipo" and (self.label_smoothing or self.margin):
            raise UserError(
                "label_smoothing and margin have no meaning with link: ipo, whose target is 1 / (2 beta). Leave them out."
            )
        if self.link == "odds" and (self.reference or self.aggregate == "sum"):
            raise UserError(
                "link: odds compares the probabilities of tokens on average, and the reference has no part in it. Write "
                "reference: false, aggregate: mean."
            )

    @property
    def needs(self) -> Needs:
        """The reference, where log-ratios are compared."""
        return Needs(reference=self.reference, pairwise=True)

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch of pairs; see :class:`tokenward.objectives.base.Objective`."""
        total = sums(log_ratios(logp, batch) if self.reference else logp, batch)
        aggregate = total if self.aggregate == "sum" else total / self._normaliser(batch)
        # With a reference the reward is DPO's implicit one, of the whole response.
        rewards = sides(self.beta * (total if self.reference else aggregate))
        metrics = reward_metrics(rewards) | logp_metrics(logp, batch)
        return Losses(self._loss(sides(aggregate)), metrics)

    def _loss(self, found: PairSides) -> Tensor:
        if self.link == "ipo":
            return ipo(*found, beta=self.beta)
        if self.link == "odds":
            found = PairSides(*map(log_odds, found))
        return pairwise(*found, link=self._loss_of_margin(), beta=self.beta, margin=self.margin)

    def _loss_of_margin(self) -> Link:
        return Link(
            name="logistic" if self.link in ("ipo", "odds") else self.link,
            label_smoothing=self.label_smoothing,
            power=self.power,
            scale=self.scale,
        )

    def _normaliser(self, batch: TokenBatch) -> Tensor:
        counted = batch.weights.abs() if self.aggregate == "mean" else torch.ones_like(batch.weights)
        return segment_sum(counted, batch.response, batch.responses)


@dataclass(frozen=True, slots=True)
class DPO:
    """Direct preference optimisation over the weighted tokens (arXiv 2305.18290, Eq. 7).

    Attributes:
        beta: Scale of the implicit reward.
        label_smoothing: Assumed share of flipped labels (cDPO), sigmoid loss only.
        loss: ``sigmoid``, or ``ipo`` (arXiv 2310.12036) with mean log-ratios, as TRL has it.
    """

    needs: ClassVar[Needs] = Needs(reference=True, pairwise=True)

    _: KW_ONLY
    beta: float = 0.1
    label_smoothing: float = 0.0
    loss: Literal["sigmoid", "ipo"] = "sigmoid"

    def __post_init__(self) -> None:
        if self.loss == "ipo" and self.label_smoothing:
            raise UserError("label_smoothing has no meaning with loss: ipo. Leave one of the two out.")
        self._family()

    def _family(self) -> Pairwise:
        if self.loss == "ipo":
            return Pairwise(link="ipo", beta=self.beta, aggregate="mean")
        return Pairwise(beta=self.beta, label_smoothing=self.label_smoothing)

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch of pairs; see :class:`tokenward.objectives.base.Objective`."""
        return self._family()(logp, batch)


@dataclass(frozen=True, slots=True)
class IPO:
    """Identity preference optimisation with mean log-ratios (arXiv 2310.12036, Eq. 17): DPO's ``loss: ipo``.

    Attributes:
        beta: The paper's tau.
    """

    needs: ClassVar[Needs] = Needs(reference=True, pairwise=True)

    _: KW_ONLY
    beta: float = 0.1

    def __post_init__(self) -> None:
        positive("beta", self.beta, 0.1)

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch of pairs; see :class:`tokenward.objectives.base.Objective`."""
        return Pairwise(link="ipo", beta=self.beta, aggregate="mean")(logp, batch)


@dataclass(frozen=True, slots=True)
class SePO:
    """Selective preference optimisation (arXiv 2408.13518, objective of section 3).

    ``-log sigma(u_w - u_l - margin)`` with ``u = gamma / z * sum_t w_t log pi(y_t)``, where ``w`` is 1 for
    the selected tokens and ``z`` the normaliser. With every token selected it is SimPO.

    Attributes:
        gamma: Scale; the paper searches 2.1 to 2.5, the published code uses 1.
        margin: The paper's lambda; 0 in the published code.
        normaliser: ``selected``: the sum of the weights' sizes; ``rate``: length times the side's rate, as the
            paper's formula has it; ``length``: all tokens of the response; ``none``: 1.
        chosen_rate: Rate of the chosen side, for ``normaliser: rate``.
        rejected_rate: Rate of the rejected side, for ``normaliser: rate``.
        profile: ``official`` sets the published code's values: gamma 1, margin 0, selected.
    """

    needs: ClassVar[Needs] = Needs(pairwise=True)

    _: KW_ONLY
    gamma: float = 2.0
    margin: float = 0.0
    normaliser: Normaliser = "selected"
    chosen_rate: float | None = None
    rejected_rate: float | None = None
    profile: Literal["official"] | None = None

    def __post_init__(self) -> None:
        positive("gamma", self.gamma, 2.0)
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
        mean = sides(sums(logp, batch) / self._normaliser(batch))
        loss = margin_logistic(*mean, scale=gamma, margin=self.margin)
        rewards = PairSides(gamma * mean.chosen, gamma * mean.rejected)
        return Losses(loss, reward_metrics(rewards) | logp_metrics(logp, batch))

    def _normaliser(self, batch: TokenBatch) -> Tensor:
        if self.normaliser == "selected":
            # Sizes: a sum of negative weights would turn the sign of each of them round.
            return segment_sum(batch.weights.abs(), batch.response, batch.responses)
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

    needs: ClassVar[Needs] = Needs(pairwise=True)

    _: KW_ONLY
    beta: float = 2.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        positive("beta", self.beta, 2.0)

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch of pairs; see :class:`tokenward.objectives.base.Objective`."""
        return SePO(gamma=self.beta, margin=self.gamma)(logp, batch)


@dataclass(frozen=True, slots=True)
class ORPO:
    """Odds ratio preference optimisation (arXiv 2403.07691, Eq. 6): likelihood of the chosen response, and odds.

    ``-p_w - beta log sigma(log odds(p_w) - log odds(p_l))`` with ``p`` the mean log-probability of the weighted
    tokens and ``log odds(p) = p - log(1 - exp(p))``, which stays exact near ``p = 0`` and is cut off at -1e-6.

    Attributes:
        beta: Share of the odds; the paper's lambda.
    """

    needs: ClassVar[Needs] = Needs(pairwise=True)

    _: KW_ONLY
    beta: float = 0.1

    def __post_init__(self) -> None:
        positive("beta", self.beta, 0.1)

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch of pairs; see :class:`tokenward.objectives.base.Objective`."""
        odds = Pairwise(link="odds", beta=1.0, reference=False, aggregate="mean")(logp, batch)
        total = segment_sum(batch.weights.abs(), batch.response, batch.responses)
        mean = sides(sums(logp, batch) / total)
        rewards = PairSides(self.beta * mean.chosen, self.beta * mean.rejected)
        metrics = {"nll": -mean.chosen.detach(), "loss/odds": odds.loss.detach()}
        return Losses(
            orpo(odds.loss, mean.chosen, beta=self.beta), odds.metrics | reward_metrics(rewards) | metrics
        )
