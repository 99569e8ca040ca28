"""Reductions over tokens that lie end to end, each with the index of the response that owns it."""

import torch
from torch import Tensor


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


def spread_over_segments(values: Tensor, segment: Tensor) -> Tensor:
    """The mean of each segment at every token of it.  [n], [n] -> [n]"""
    count = int(segment.max()) + 1 if len(segment) else 0
    sizes = segment_sum(torch.ones_like(values), segment, count)
    return (segment_sum(values, segment, count) / sizes)[segment]
