"""Reductions over tokens that lie end to end, each with the index of the response that owns it."""

from typing import NamedTuple

import torch
from torch import Tensor


class Aligned(NamedTuple):
    """Tokens of two responses, paired by their position among those that have weight.  [m] each

    Attributes:
        chosen: Index of the preferred response's token.
        rejected: Index of the other's.
        pair: Which pair of responses owns the two.
    """

    chosen: Tensor
    rejected: Tensor
    pair: Tensor


def segment_sum(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """Sum of the values of each owner.  [n], [n] -> [count]"""
    return values.new_zeros(count).index_add(0, owner, values)


def weighted_sum(values: Tensor, weights: Tensor, owner: Tensor, count: int) -> Tensor:
    """Weighted sum per owner.  [n], [n], [n] -> [count]

    A zero weight removes its token: even a value that is not finite adds nothing there and gets a
    gradient of exactly 0.
    """
    kept = torch.where(weights != 0, values, 0.0)
    return segment_sum(kept * weights, owner, count)


def weighted_mean(values: Tensor, weights: Tensor, owner: Tensor, count: int) -> Tensor:
    """Weighted mean per owner; NaN for an owner whose weights are all zero.  [n], [n], [n] -> [count]"""
    total = segment_sum(weights, owner, count)
    return weighted_sum(values, weights, owner, count) / total


def segment_logsumexp(values: Tensor, weights: Tensor, owner: Tensor, count: int) -> Tensor:
    """``log sum_t w_t exp(value_t)`` per owner; -inf for one without weight.  [n], [n], [n] -> [count]

    The owner's largest value is taken out first, so that nothing overflows or vanishes. A zero weight
    removes its token as in :func:`weighted_sum`.
    """
    present = weights != 0
    peak = values.new_full((count,), -torch.inf).scatter_reduce(
        0, owner, torch.where(present, values.detach(), -torch.inf), "amax"
    )
    peak = torch.where(peak.isfinite(), peak, 0.0)
    shifted = torch.where(present, values - peak[owner], 0.0)
    total = segment_sum(shifted.exp() * weights, owner, count)
    # log 0 has an infinite gradient, which would meet the zero weights as NaN.
    nothing = total == 0
    return torch.where(nothing, -torch.inf, torch.where(nothing, 1.0, total).log() + peak)


def position_in_group(group: Tensor) -> Tensor:
    """Place of each element among those of its group, in the given order.  [n] -> [n]

    Groups need not be contiguous.
    """
    order = torch.argsort(group, stable=True)
    grouped = group[order]
    starts = torch.searchsorted(grouped, grouped)
    places = torch.arange(len(group), device=group.device) - starts
    return torch.empty_like(places).scatter_(0, order, places)


def aligned(kept: Tensor, response: Tensor, responses: int) -> Aligned:
    """Pair the tokens of responses that lie better, other, as far as the shorter one goes.  [m], [n] -> Aligned

    Args:
        kept: Indices of the tokens with weight.
        response: Which response owns each token.
        responses: Number of responses, even.
    """
    owner = response[kept]
    count = torch.bincount(owner, minlength=responses)
    shorter = torch.minimum(count[0::2], count[1::2])
    inside = position_in_group(owner) < shorter[owner // 2]
    chosen, rejected = (kept[inside & (owner % 2 == side)] for side in (0, 1))
    return Aligned(chosen, rejected, response[chosen] // 2)


def spread_over_segments(values: Tensor, segment: Tensor) -> Tensor:
    """The mean of each segment at every token of it.  [n], [n] -> [n]"""
    count = int(segment.max()) + 1 if len(segment) else 0
    sizes = segment_sum(torch.ones_like(values), segment, count)
    return (segment_sum(values, segment, count) / sizes)[segment]
