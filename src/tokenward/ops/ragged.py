# torch leaves parts of what is used here untyped.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
"""Reductions over tokens laid end to end, each with the index of the response that owns it."""

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


class Moments(NamedTuple):
    """Of each group.  [groups] float64 each

    Attributes:
        size: How many numbers it has.
        mean: NaN where it has none.
        spread: Standard deviation over the group itself, not an estimate.
    """

    size: Tensor
    mean: Tensor
    spread: Tensor


def group_moments(values: Tensor, group: Tensor, groups: int) -> Moments:
    """Size, mean and standard deviation of each group.  [n], [n] -> [groups]"""
    present = ~values.isnan()
    count = segment_sum(present.double(), group, groups)
    mean = segment_sum(torch.where(present, values, 0.0).double(), group, groups) / count
    apart = torch.where(present, values.double() - mean[group], 0.0)
    return Moments(count, mean, (segment_sum(apart.square(), group, groups) / count).sqrt())


class Extremes(NamedTuple):
    """Least and largest number of each group; infinite where it has none.  [groups] each"""

    least: Tensor
    largest: Tensor


def group_extremes(values: Tensor, group: Tensor, groups: int) -> Extremes:
    """Least and largest number of each group.  [n], [n] -> [groups]"""
    low, high = values.new_full((groups,), torch.inf), values.new_full((groups,), -torch.inf)
    present = ~values.isnan()
    least = low.scatter_reduce(0, group, torch.where(present, values, torch.inf), "amin")
    return Extremes(least, high.scatter_reduce(0, group, torch.where(present, values, -torch.inf), "amax"))


class Sorted(NamedTuple):
    """Numbers by group and, within it, by size; those that are NaN come last in their group.

    Attributes:
        order: ``[n]``, where each number stood.
        values: ``[n]`` float64.
        first: ``[groups]``, where each group begins.
        size: ``[groups]``, how many numbers it has that are not NaN.
    """

    order: Tensor
    values: Tensor
    first: Tensor
    size: Tensor


def sort_groups(values: Tensor, group: Tensor, groups: int) -> Sorted:
    """Sort numbers within their groups.  [n], [n]"""
    by_size = torch.argsort(values.double(), stable=True)  # torch sorts NaN behind everything
    order = by_size[torch.argsort(group[by_size], stable=True)]
    sizes = segment_sum(torch.ones_like(group), group, groups)
    count = segment_sum((~values.isnan()).long(), group, groups)
    return Sorted(order, values.double()[order], sizes.cumsum(0) - sizes, count)


def group_quantile(values: Tensor, group: Tensor, groups: int, share: float) -> Tensor:
    """Quantile of each group, linear between two numbers as numpy's default; NaN for an empty one.  -> [groups] float64"""
    found = sort_groups(values, group, groups)
    place = share * (found.size - 1).clamp(min=0).double()
    last = max(len(values) - 1, 0)
    below, above = ((found.first + edge(place).long()).clamp(max=last) for edge in (torch.floor, torch.ceil))
    if not len(values):
        return place.new_full((groups,), torch.nan)
    low, high = found.values[below], found.values[above]
    # Equal ends are taken as they are: infinity less infinity would be NaN.
    between = torch.where(low == high, low, low + (high - low) * (place - place.floor()))
    return torch.where(found.size > 0, between, torch.nan)


def group_ranks(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Rank of each number in its group, 0 the smallest; equal numbers share their mean rank.  [n], [n] -> [n] float64"""
    found = sort_groups(values, group, groups)
    owner = group[found.order]
    fresh = torch.ones(len(values), dtype=torch.bool, device=values.device)
    fresh[1:] = (found.values[1:] != found.values[:-1]) | (owner[1:] != owner[:-1])
    run = fresh.long().cumsum(0) - 1
    runs = int(run[-1]) + 1 if len(run) else 0
    place = position_in_group(owner).double()
    size = segment_sum(torch.ones_like(place), run, runs)
    shared = segment_sum(place, run, runs) / size
    ranks = torch.empty_like(place)
    ranks[found.order] = shared[run]
    return torch.where(values.isnan(), torch.nan, ranks)
