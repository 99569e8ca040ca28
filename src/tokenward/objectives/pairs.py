"""What objectives over pairs share: the two sides, sums over them, and TRL's metrics."""

from typing import NamedTuple

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.ops.ragged import segment_sum, weighted_sum
from tokenward.tokens.batches import TokenBatch


class Sides(NamedTuple):
    """The same quantity for the preferred and the other response.  [b] each"""

    chosen: Tensor
    rejected: Tensor


def sides(per_response: Tensor) -> Sides:
    """Split values of responses that lie better, other, better, other.  [2 b] -> [b], [b]"""
    return Sides(per_response[0::2], per_response[1::2])


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
    assert batch.kl is not None
    return weighted_sum(batch.kl, batch.weights.abs(), batch.response, batch.responses)


def reward_metrics(rewards: Sides) -> dict[str, Tensor]:
    """Of both sides' rewards, without gradient."""
    rewards = Sides(*(side.detach() for side in rewards))
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
