"""Select the best tokens, with exact counts and stable ties."""

from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from tokenward.ops.ragged import group_extremes, group_moments, position_in_group, segment_sum

CountRule = Literal["floor", "round", "ceil", "float"]
Pooling = Literal["largest", "smallest", "mean", "sum"]

MAX_DENOMINATOR = 10**9


def kept_count(totals: Tensor, fraction: float, *, rule: CountRule, minimum: int) -> Tensor:
    """Number of tokens that a fraction keeps, in exact arithmetic.  [g] -> [g]

    0.7 of 90 is 63, although ``int(0.7 * 90)`` is 62. The rule ``"float"`` gives 62, as the published SePO code does;
    ``"round"`` rounds halves up. At least ``minimum`` tokens are kept if there are as many.
    """
    if rule == "float":
        counts = (totals.double() * fraction).long()
    else:
        # The fraction as written in decimal, with 0.333... as one third. The limit keeps the product within 64 bits.
        exact = Fraction(str(fraction)).limit_denominator(MAX_DENOMINATOR)
        product = totals * exact.numerator
        added = {"floor": 0, "round": exact.denominator // 2, "ceil": exact.denominator - 1}[rule]
        counts = (product + added) // exact.denominator
    return counts.clamp(min=minimum).minimum(totals)


def top_count(scores: Tensor, group: Tensor, counts: Tensor) -> Tensor:
    """Select the ``counts[g]`` highest scores of each group; the earliest token wins a tie.  [n], [n], [g] -> [n] bool

    A NaN score is never selected.
    """
    by_score = torch.argsort(torch.where(scores.isnan(), -torch.inf, scores), descending=True, stable=True)
    # -inf may be a real score, so NaN is moved behind it by a second sort.
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
    """Select the highest ``fraction`` of the tokens with a score in each group.  [n], [n] -> [n] bool"""
    totals = segment_sum((~scores.isnan()).long(), group, groups)
    return top_count(scores, group, kept_count(totals, fraction, rule=rule, minimum=minimum))


def pooled_scores(scores: Tensor, owner: Tensor, count: int, *, how: Pooling) -> Tensor:
    """Pool the scores of each owner, ignoring NaN; NaN for an owner without scores.  [n], [n] -> [count] float64"""
    tokens, mean, _ = group_moments(scores, owner, count)
    if how in ("mean", "sum"):
        return mean if how == "mean" else mean * tokens
    smallest, largest = group_extremes(scores, owner, count)
    return torch.where(tokens > 0, (largest if how == "largest" else smallest).double(), torch.nan)


def best_places(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` highest scores, best first; the earliest wins a tie, NaN is left out.  [n] -> [k]"""
    order = torch.argsort(torch.where(scores.isnan(), -torch.inf, scores), descending=True, stable=True)
    return order[~scores[order].isnan()][:count]
