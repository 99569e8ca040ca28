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


def position_in_group(group: Tensor) -> Tensor:
    """Place of each element among those of its group, in the given order.  [n] -> [n]

    Groups need not be contiguous.
    """
    order = torch.argsort(group, stable=True)
    grouped = group[order]
    starts = torch.searchsorted(grouped, grouped)
    places = torch.arange(len(group), device=group.device) - starts
    return torch.empty_like(places).scatter_(0, order, places)
