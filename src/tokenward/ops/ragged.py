# torch leaves parts of what is used here untyped.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
"""Reductions over concatenated tokens, each with the index of the response that owns it."""

from typing import NamedTuple

import torch
from torch import Tensor


class Aligned(NamedTuple):
    """Tokens of the two responses of a pair, matched by their position among the weighted tokens.  [m] each"""

    chosen: Tensor  # index of the chosen response's token
    rejected: Tensor  # index of the rejected response's token
    pair: Tensor  # pair that owns both


def segment_sum(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """Sum per owner.  [n], [n] -> [count]"""
    return values.new_zeros(count).index_add(0, owner, values)


def weighted_sum(values: Tensor, weights: Tensor, owner: Tensor, count: int) -> Tensor:
    """Weighted sum per owner.  [n], [n], [n] -> [count]

    A zero weight removes its token: a value that is not finite contributes nothing there and its gradient is exactly 0.
    """
    kept = torch.where(weights != 0, values, 0.0)
    return segment_sum(kept * weights, owner, count)


def weighted_mean(values: Tensor, weights: Tensor, owner: Tensor, count: int) -> Tensor:
    """Weighted mean per owner; NaN for an owner whose weights are all zero.  [n], [n], [n] -> [count]"""
    total = segment_sum(weights, owner, count)
    return weighted_sum(values, weights, owner, count) / total


def segment_logsumexp(values: Tensor, weights: Tensor, owner: Tensor, count: int) -> Tensor:
    """``log sum_t w_t exp(value_t)`` per owner; -inf without weight.  [n], [n], [n] -> [count]

    A zero weight removes its token as in :func:`weighted_sum`.
    """
    present = weights != 0
    # Subtracting the largest value of each owner avoids overflow and underflow.
    peak = values.new_full((count,), -torch.inf).scatter_reduce(
        0, owner, torch.where(present, values.detach(), -torch.inf), "amax"
    )
    peak = torch.where(peak.isfinite(), peak, 0.0)
    shifted = torch.where(present, values - peak[owner], 0.0)
    total = segment_sum(shifted.exp() * weights, owner, count)
    # log 0 has an infinite gradient, and infinity times a zero weight is NaN.
    nothing = total == 0
    return torch.where(nothing, -torch.inf, torch.where(nothing, 1.0, total).log() + peak)


def position_in_group(group: Tensor) -> Tensor:
    """Place of each element within its group, in the given order. Groups need not be contiguous.  [n] -> [n]"""
    order = torch.argsort(group, stable=True)
    grouped = group[order]
    starts = torch.searchsorted(grouped, grouped)
    places = torch.arange(len(group), device=group.device) - starts
    return torch.empty_like(places).scatter_(0, order, places)


def aligned(kept: Tensor, response: Tensor, responses: int) -> Aligned:
    """Match the tokens of each pair of responses, up to the end of the shorter one.  [m], [n] -> Aligned

    ``kept`` are the indices of the tokens with weight. Chosen responses have even numbers, their partners the next one.
    """
    owner = response[kept]
    count = segment_sum(torch.ones_like(owner), owner, responses)
    shorter = torch.minimum(count[0::2], count[1::2])
    inside = position_in_group(owner) < shorter[owner // 2]
    chosen, rejected = (kept[inside & (owner % 2 == side)] for side in (0, 1))
    return Aligned(chosen, rejected, response[chosen] // 2)


def spread_over_segments(values: Tensor, segment: Tensor, segments: int | None = None) -> Tensor:
    """Replace each value by the mean of its segment.  [n], [n] -> [n]

    ``segments`` is their number; None to read it, for which the host waits for a GPU.
    """
    count = (int(segment.max()) + 1 if len(segment) else 0) if segments is None else segments
    sizes = segment_sum(torch.ones_like(values), segment, count)
    return (segment_sum(values, segment, count) / sizes)[segment]


class Moments(NamedTuple):
    """Moments of each group.  [groups] float64 each"""

    size: Tensor  # count of numbers that are not NaN
    mean: Tensor  # NaN for an empty group
    spread: Tensor  # population standard deviation


def group_moments(values: Tensor, group: Tensor, groups: int) -> Moments:
    """Size, mean and standard deviation of each group, without its NaN.  [n], [n] -> [groups] each"""
    present = ~values.isnan()
    count = segment_sum(present.double(), group, groups)
    mean = segment_sum(torch.where(present, values, 0.0).double(), group, groups) / count
    apart = torch.where(present, values.double() - mean[group], 0.0)
    return Moments(count, mean, (segment_sum(apart.square(), group, groups) / count).sqrt())


def group_extremes(values: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each group; infinite for an empty one.  [n], [n] -> [groups] each"""
    low, high = values.new_full((groups,), torch.inf), values.new_full((groups,), -torch.inf)
    present = ~values.isnan()
    least = low.scatter_reduce(0, group, torch.where(present, values, torch.inf), "amin")
    return least, high.scatter_reduce(0, group, torch.where(present, values, -torch.inf), "amax")


def _sort_groups(values: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Order by group and then by value, NaN last; the sorted values; start and size without NaN of each group."""
    by_size = torch.argsort(values.double(), stable=True)  # torch sorts NaN last
    order = by_size[torch.argsort(group[by_size], stable=True)]
    sizes = segment_sum(torch.ones_like(group), group, groups)
    count = segment_sum((~values.isnan()).long(), group, groups)
    return order, values.double()[order], sizes.cumsum(0) - sizes, count


def group_quantile(values: Tensor, group: Tensor, groups: int, share: float) -> Tensor:
    """Quantile of each group with numpy's linear interpolation; NaN for an empty group.  [n], [n] -> [groups] float64"""
    _, ordered, first, size = _sort_groups(values, group, groups)
    place = share * (size - 1).clamp(min=0).double()
    if not len(values):
        return place.new_full((groups,), torch.nan)
    below, above = (
        ordered[(first + edge(place).long()).clamp(max=len(values) - 1)] for edge in (torch.floor, torch.ceil)
    )
    # Equal ends need no interpolation, and infinity minus infinity would be NaN.
    between = torch.where(below == above, below, below + (above - below) * (place - place.floor()))
    return torch.where(size > 0, between, torch.nan)


def group_ranks(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Rank of each number in its group from 0; equal numbers share their mean rank, NaN stays NaN.  [n], [n] -> [n] float64"""
    order, ordered, _, _ = _sort_groups(values, group, groups)
    owner = group[order]
    fresh = torch.ones(len(values), dtype=torch.bool, device=values.device)
    fresh[1:] = (ordered[1:] != ordered[:-1]) | (owner[1:] != owner[:-1])
    run = fresh.long().cumsum(0) - 1
    runs = int(run[-1]) + 1 if len(run) else 0
    place = position_in_group(owner).double()
    size = segment_sum(torch.ones_like(place), run, runs)
    shared = segment_sum(place, run, runs) / size
    ranks = torch.empty_like(place)
    ranks[order] = shared[run]
    return torch.where(values.isnan(), torch.nan, ranks)
