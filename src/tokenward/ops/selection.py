"""Which tokens to keep: exact counts, stable ties."""

from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from tokenward.ops.ragged import group_extremes, group_moments, position_in_group, segment_sum

CountRule = Literal["floor", "round", "ceil", "float"]
Pooling = Literal["largest", "mean", "sum"]

MAX_DENOMINATOR = 10**9


def kept_count(totals: Tensor, fraction: float, *, rule: CountRule, minimum: int) -> Tensor:
    """How many of ``totals`` tokens a fraction keeps, in exact arithmetic.  [g] -> [g]

    0.7 of 90 is 63, although ``int(0.7 * 90)`` is 62; rule ``"float"`` is that of the published SePO
    code and gives 62. ``"round"`` rounds halves up. At least ``minimum`` is kept where there is as much.
    """
    if rule == "float":
        counts = (totals.double() * fraction).long()
    else:
        # As written in decimal; 0.333... is one third. The limit keeps the product within 64 bits.
        exact = Fraction(str(fraction)).limit_denominator(MAX_DENOMINATOR)
        product = totals * exact.numerator
        added = {"floor": 0, "round": exact.denominator // 2, "ceil": exact.denominator - 1}[rule]
        counts = (product + added) // exact.denominator
    return counts.clamp(min=minimum).minimum(totals)


def top_count(scores: Tensor, group: Tensor, counts: Tensor) -> Tensor:
    """The ``counts[g]`` highest scores of each group; the earliest wins a tie.  [n], [n], [g] -> [n] bool

    A score of NaN is never kept: that is how a token is left out of the choice.
    """
    by_score = torch.argsort(torch.where(scores.isnan(), -torch.inf, scores), descending=True, stable=True)
    # -inf may be a real score: NaN must still come after it.
    by_score = by_score[torch.argsort(scores[by_score].isnan(), stable=True)]
    order = by_score[torch.argsort(group[by_score], stable=True)]
    places = torch.empty_like(order)
    places[order] = position_in_group(group[order])
    return (places < counts[group]) & ~scores.isnan()


def top_fraction(
    scores: Tensor,
    group: Tensor,
    groups: int,
    fraction: float,
    *,
    rule: CountRule = "floor",
    minimum: int = 1,
) -> Tensor:
    """The highest ``fraction`` of each group's tokens that have a score.  [n], [n] -> [n] bool"""
    totals = segment_sum((~scores.isnan()).long(), group, groups)
    return top_count(scores, group, kept_count(totals, fraction, rule=rule, minimum=minimum))


def pooled_scores(scores: Tensor, owner: Tensor, count: int, *, how: Pooling) -> Tensor:
    """One number for all tokens of an owner: their largest score, or the mean or sum.  [n], [n] -> [count] float64

    A token without a score (NaN) is left out; an owner of none that has one gets NaN.
    """
    tokens, mean, _ = group_moments(scores, owner, count)
    if how == "largest":
        return torch.where(tokens > 0, group_extremes(scores, owner, count).largest.double(), torch.nan)
    return mean if how == "mean" else mean * tokens


def best_places(scores: Tensor, count: int) -> Tensor:
    """Where the ``count`` highest scores stand, the highest first; the earliest wins a tie.  [n] -> [k]

    A score of NaN is never among them, so that k may be less than ``count``.
    """
    order = torch.argsort(torch.where(scores.isnan(), -torch.inf, scores), descending=True, stable=True)
    return order[~scores[order].isnan()][:count]
