# torch leaves parts of what is used here untyped.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
"""Statistics of numbers that fall into groups; a number that is NaN is none and belongs to no group."""

from typing import NamedTuple

import torch
from torch import Tensor

from tokenward.ops.ragged import position_in_group, segment_sum


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
