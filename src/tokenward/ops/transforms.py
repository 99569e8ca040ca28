# torch leaves parts of what is used here untyped.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
"""Transforms of token scores: scaling, thresholds, clusters, pooling and bounds."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenward.ops.ragged import (
    group_extremes,
    group_moments,
    group_quantile,
    group_ranks,
    position_in_group,
    segment_logsumexp,
    segment_sum,
)
from tokenward.ops.selection import CountRule, Pooling, pooled_scores, top_fraction

BINS = 256
"""Multi-Otsu first puts more different values than this into a histogram with this many bins."""


def otsu_cuts(values: Tensor, classes: int, *, bins: int = BINS) -> Tensor:
    """Multi-Otsu thresholds, ascending; a number at a threshold belongs above it.  [n] -> [classes - 1] float64

    They maximize the variance between classes (Otsu, 1979; Liao, Chen and Chung, 2001): exactly for up to ``bins``
    different values, else for a histogram. Infinities and NaN are ignored. With fewer values than classes, the upper
    thresholds are infinite.
    """
    values = values[values.isfinite()].double()
    cuts = torch.full((classes - 1,), torch.inf, dtype=torch.float64, device=values.device)
    levels, counts, edges = _histogram(values, bins)
    found = _best_ends(levels, counts, min(classes, len(levels))) if len(levels) else []
    for number, last in enumerate(found):
        cuts[number] = edges[last]
    return cuts


def _histogram(values: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Occurring levels, their counts, and the edge above each except the last.  [levels], [levels], [levels - 1]"""
    levels, counts = torch.unique(values, return_counts=True)
    if len(levels) <= bins:
        return levels, counts.double(), (levels[1:] + levels[:-1]) / 2
    edges = torch.linspace(float(levels[0]), float(levels[-1]), bins + 1, dtype=torch.float64)
    edges = edges.to(values.device)
    place = torch.bucketize(values, edges[1:-1], right=True)
    counts = torch.bincount(place, minlength=bins)
    some = counts.nonzero().squeeze(-1)
    means = torch.zeros(bins, dtype=torch.float64, device=values.device).index_add(0, place, values)
    return means[some] / counts[some], counts[some].double(), edges[1:][some[:-1]]


def _best_ends(levels: Tensor, counts: Tensor, classes: int) -> list[int]:
    """Last level of each class except the last, by dynamic programming over all cuts."""
    size = len(levels)
    number, total = (torch.cat((part.new_zeros(1), part.cumsum(0))) for part in (counts, counts * levels))
    # share[i, j]: contribution of the class with levels i..j to the variance between classes, up to a constant.
    weight, mass = number[None, 1:] - number[:-1, None], total[None, 1:] - total[:-1, None]
    inside = torch.ones_like(weight, dtype=torch.bool).triu()
    share = torch.where(inside, mass.square() / torch.where(inside, weight, 1.0), -torch.inf)
    best, ends = share[0], list[Tensor]()
    for _ in range(classes - 1):
        # The previous class ends at i - 1; this class has the levels i to j.
        reach = best[:-1, None] + share[1:]
        best, where = reach.max(0)
        ends.append(where)
    cuts = [size - 1]
    for where in reversed(ends):
        cuts.append(int(where[cuts[-1]]))
    return sorted(cuts)[:-1]


def otsu_class(values: Tensor, cuts: Tensor) -> Tensor:
    """Class of each number, 0 the lowest; -1 for NaN.  [n], [c - 1] -> [n]"""
    place = torch.bucketize(values.double(), cuts, right=True)
    return torch.where(values.isnan(), -1, place)


At = Literal["value", "mean", "median", "quantile", "iqr", "otsu"]
Pool = Literal["mean", "sum", "max", "min"]
Transform = Literal["identity", "exp", "power"]

_POOLS: dict[Pool, Pooling] = {"mean": "mean", "sum": "sum", "max": "largest", "min": "smallest"}


def affine(scores: Tensor, scale: float, shift: float) -> Tensor:
    """``scale * s + shift``.  [n] -> [n]"""
    return scale * scores + shift


def clamp(scores: Tensor, low: float | None, high: float | None) -> Tensor:
    """Scores clamped to [low, high]; None is no bound.  [n] -> [n]"""
    return scores if low is None and high is None else scores.clamp(low, high)


def exponential(scores: Tensor, temperature: float) -> Tensor:
    """``exp(s / temperature)``.  [n] -> [n]"""
    return (scores / temperature).exp()


def shifted_sigmoid(scores: Tensor, shift: float) -> Tensor:
    """``sigma(s) + shift``.  [n] -> [n]"""
    return scores.sigmoid() + shift


def rank_scale(scores: Tensor, group: Tensor, groups: int, low: float, high: float) -> Tensor:
    """Map ranks linearly to [low, high] within each group.  [n], [n] -> [n]

    Equal scores get the same value, and the middle if all scores of a group are equal.
    """
    ranks = group_ranks(scores, group, groups)
    count = segment_sum((~scores.isnan()).double(), group, groups)[group]
    share = torch.where(count > 1, ranks / (count - 1).clamp(min=1), torch.where(ranks.isnan(), ranks, 0.5))
    return (low + (high - low) * share).to(scores.dtype)


def standardise(scores: Tensor, group: Tensor, groups: int) -> Tensor:
    """Subtract the mean of the group and divide by its standard deviation; 0 if all are equal.  [n], [n] -> [n]"""
    _, mean, spread = group_moments(scores, group, groups)
    centered = scores.double() - mean[group]
    varied = spread[group] > 0
    # 0 times the difference instead of 0, so that NaN stays NaN.
    found = torch.where(varied, centered / torch.where(varied, spread[group], 1.0), 0.0 * centered)
    return found.to(scores.dtype)


def min_max(scores: Tensor, group: Tensor, groups: int) -> Tensor:
    """Scale each group to [0, 1]; 0 if all scores are equal.  [n], [n] -> [n]"""
    least, largest = (part[group] for part in group_extremes(scores, group, groups))
    return (scores - least) / torch.where(largest > least, largest - least, 1.0)


def top(
    scores: Tensor,
    group: Tensor,
    groups: int,
    fraction: float,
    *,
    which: Literal["largest", "smallest"],
    rule: CountRule,
    minimum: int,
) -> Tensor:
    """1 for the largest or smallest fraction of each group, else 0; the earliest token wins a tie.  [n], [n] -> [n]"""
    directed = scores if which == "largest" else -scores
    kept = top_fraction(directed, group, groups, fraction, rule=rule, minimum=minimum)
    return _flags(kept, scores)


def threshold_of(
    scores: Tensor, group: Tensor, groups: int, at: At, *, value: float, factor: float, classes: int, cut: int
) -> Tensor:
    """Threshold of each group.  [n], [n] -> [groups] float64

    Args:
        scores: ``[n]``.
        group: ``[n]``.
        groups: Number of groups.
        at: ``value``: the number ``value``; ``mean``; ``median``; ``quantile``: the quantile ``value``; ``iqr``: ``factor``
            interquartile ranges below the first quartile, or above the third if the factor is negative; ``otsu``: a
            threshold of :func:`otsu_cuts`.
        value: See ``at``.
        factor: See ``at``.
        classes: Number of classes for ``otsu``.
        cut: Index of the threshold for ``otsu``, 0 the lowest.
    """
    if at == "value":
        return torch.full((groups,), value, dtype=torch.float64, device=scores.device)
    if at == "mean":
        return group_moments(scores, group, groups).mean
    if at == "otsu":
        cuts = [otsu_cuts(scores[mine], classes)[cut] for mine in _members(group, groups)]
        return torch.stack(cuts) if cuts else scores.new_zeros(0).double()
    if at == "iqr":
        first, third = (group_quantile(scores, group, groups, share) for share in (0.25, 0.75))
        return (first if factor >= 0 else third) - factor * (third - first)
    return group_quantile(scores, group, groups, 0.5 if at == "median" else value)


def keep_side(scores: Tensor, group: Tensor, thresholds: Tensor, keep: Literal["above", "below"]) -> Tensor:
    """1 for scores on one side of their group's threshold, else 0.  [n], [n], [groups] -> [n]

    ``below`` is strict and ``above`` is its complement, so every score is on exactly one side.
    """
    below = scores.double() < thresholds[group]
    return _flags(below if keep == "below" else ~below, scores)


def cluster(scores: Tensor, group: Tensor, groups: int, classes: int, keep: tuple[int, ...]) -> Tensor:
    """1 for scores in the multi-Otsu classes ``keep`` of their group, else 0.  [n], [n] -> [n]"""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    wanted = torch.tensor(keep, device=scores.device)
    for mine in _members(group, groups):
        found = otsu_class(scores[mine], otsu_cuts(scores[mine], classes))
        kept[mine] = torch.isin(found, wanted)
    return _flags(kept, scores)


def segment_pool(scores: Tensor, segment: Tensor, how: Pool, place: Literal["all", "end", "start"]) -> Tensor:
    """One number per segment, at all of its tokens, or at one of them and 0 at the others.  [n], [n] -> [n]

    NaN is ignored and stays NaN. ``segment`` is ascending. ``place`` is ``all`` tokens, or the last (``end``) or first
    (``start``) token with a score.
    """
    _, segment = torch.unique_consecutive(segment, return_inverse=True)
    count = int(segment[-1]) + 1 if len(segment) else 0
    pooled = pooled_scores(scores, segment, count, how=_POOLS[how])
    spread = torch.where(scores.isnan(), scores, pooled.to(scores.dtype)[segment])
    if place == "all":
        return spread
    # Among the tokens with a score, find the last or first one of each segment.
    present = (~scores.isnan()).nonzero().squeeze(-1)
    owner = segment[present]
    edge = torch.ones_like(owner, dtype=torch.bool)
    changes = owner[1:] != owner[:-1]
    if place == "end":
        edge[:-1] = changes
    else:
        edge[1:] = changes
    at = torch.zeros_like(scores, dtype=torch.bool)
    at[present[edge]] = True
    return torch.where(at | scores.isnan(), spread, 0.0)


def decay(scores: Tensor, response: Tensor, rate: float, first: int) -> Tensor:
    """``rate ** (t + first) * s`` for token t of a response, counted from 0.  [n], [n] -> [n]"""
    return scores * float(rate) ** (position_in_group(response) + first).to(scores.dtype)


def _flags(kept: Tensor, scores: Tensor) -> Tensor:
    return torch.where(scores.isnan(), scores, kept.to(scores.dtype))


def _members(group: Tensor, groups: int) -> list[Tensor]:
    """Indices of the tokens of each group, in order."""
    sizes = segment_sum(torch.ones_like(group), group, groups)
    return list(torch.argsort(group, stable=True).split(sizes.tolist()))


def beyond_shorter(scores: Tensor, response: Tensor, comparison: Tensor, rate: float) -> Tensor:
    """Multiply scores by ``rate`` beyond the length of the comparison's shortest response.  [n], [n], [n] -> [n]"""
    if not len(scores):
        return scores
    lengths = torch.bincount(response)[response]
    shortest = torch.full((int(comparison.max()) + 1,), int(lengths.max()), device=scores.device)
    shortest.scatter_reduce_(0, comparison, lengths, "amin")
    return torch.where(position_in_group(response) < shortest[comparison], scores, rate * scores)


def bound_softplus(z: Tensor, low: float, high: float, *, exact: bool = False) -> Tensor:
    """TLM's soft bound of a raw reward on both sides, increasing in ``z``.  [n] -> [n]

    ``u = high - softplus(high - z)``, ``r = low + softplus(u - low)``. The second softplus raises the upper limit: the
    range is ``(low, low + softplus(high - low))``. For the published 1e-8 and 1 this is (1e-8, 1.3133), not (0, 1).

    ``exact`` rescales to the range ``(low, high)``.
    """
    under = high - _softplus(high - z)
    above = _softplus(under - low)
    if exact:
        span = torch.as_tensor(high - low, dtype=z.dtype, device=z.device)
        above = above * ((high - low) / _softplus(span))
    return low + above


def bound_sigmoid(z: Tensor, low: float, high: float) -> Tensor:
    """``low + (high - low) sigma(z)``.  [n] -> [n]"""
    return low + (high - low) * z.sigmoid()


def likelihood_weights(
    rewards: Tensor,
    weights: Tensor,
    owner: Tensor,
    count: int,
    *,
    transform: Transform = "identity",
    temperature: float = 1.0,
    power: float = 1.0,
    uniform: float = 0.0,
) -> Tensor:
    """Share of each token in the likelihood of its owner; shares of an owner sum to 1.  [n], [n], [n] -> [n]

    ``w_t = f(r_t) / sum_t' f(r_t')``, with ``f(r) = r`` in the paper (TLM, reward-weighted maximum likelihood). No gradient
    flows to the rewards.

    Args:
        rewards: > 0 for ``identity`` and ``power``, else NaN.
        weights: Number of times that each token counts; 0 removes it, whatever its reward, and gives 0.
        owner: Sequence that owns each token.
        count: Number of sequences.
        transform: ``f``: ``identity``, ``exp(r / temperature)`` or ``r ** power``.
        temperature: For ``exp``, > 0.
        power: For ``power``.
        uniform: Share of uniform weights mixed in, in [0, 1].
    """
    present = weights != 0
    rewards = torch.where(present, rewards.detach(), 1.0)
    logits = rewards / temperature if transform == "exp" else rewards.log()
    if transform == "power":
        logits = power * logits
    whole = segment_logsumexp(logits, weights, owner, count)
    shares = weights * (logits - whole[owner]).exp()
    # Normalize again: the difference of two large float32 logarithms is accurate to about 1e-6 only.
    shares = shares / segment_sum(shares, owner, count)[owner]
    equal = weights / segment_sum(weights, owner, count)[owner]
    return torch.where(present, (1 - uniform) * shares + uniform * equal, 0.0)


def _softplus(z: Tensor) -> Tensor:
    """Softplus without torch's switch to the identity above 20, a step that is not monotone in float64."""
    return -F.logsigmoid(-z)
