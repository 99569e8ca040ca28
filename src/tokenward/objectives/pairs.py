"""What objectives over pairs share: the two sides, sums over them, links from a margin to its loss, and TRL's metrics."""

from dataclasses import KW_ONLY, dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.ops import links
from tokenward.ops.ragged import segment_sum, weighted_sum
from tokenward.tokens.batches import TokenBatch


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
