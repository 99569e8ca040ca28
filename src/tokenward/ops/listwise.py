# torch leaves parts of what is used here untyped.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
"""Losses over ranked lists of responses, with ties and for groups of unequal size."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenward.ops.ragged import position_in_group, segment_sum

LARGEST_TIE = 12
"""Largest tie whose orders are averaged; each member doubles the work."""


class Agreement(NamedTuple):
    """Agreement of scores and ranks.  [b] each"""

    accuracy: Tensor  # share of pairs of different rank that are ordered correctly, equal scores being wrong; NaN without such
    top: Tensor  # 1 if a response of the best rank scores higher than all other responses
    spread: Tensor  # standard deviation of the scores in the group, divided by K and not K - 1


class Subsets(NamedTuple):
    """Random subsets of comparisons.  [m] each"""

    response: Tensor  # index of each drawn response
    subset: Tensor  # subset that it belongs to: draw x comparisons + comparison


class _Lists(NamedTuple):
    """Groups as rows.  [b k] each"""

    scores: Tensor
    rank: Tensor
    present: Tensor


def plackett_luce(
    scores: Tensor,
    rank: Tensor,
    comparison: Tensor,
    comparisons: int,
    *,
    temperature: float = 1.0,
    tie_break: Tensor | None = None,
    longest: int | None = None,
    ties: bool = True,
) -> Tensor:
    """Negative log-likelihood of a ranking under the Plackett-Luce model (ListMLE).  [r], [r], [r] -> [b]

    ``sum_k log(sum_{i >= k} exp(e_i)) - e_k`` with the responses sorted by rank. For two responses this is the
    Bradley-Terry loss ``-log sigma(e_1 - e_2)``. TLM (arXiv 2306.00398), preference loss of section 2.

    Args:
        scores: ``e``, one per response.
        rank: 0 is the best; equal ranks are a tie.
        comparison: Comparison that owns each response.
        comparisons: Number of comparisons, ``b``. They may have different numbers of responses.
        temperature: Divides the scores, > 0.
        tie_break: ``[r]`` numbers that order ties, drawn by the caller. By default the loss is the mean over all
            orders of the tied responses.
        longest: Largest number of responses of a comparison; None to count them, for which the host waits for a GPU.
        ties: Whether there may be ties. If not, they are not looked for, which makes the host wait too; a tie is then NaN.

    Raises:
        ValueError: A tie has more than 12 responses and there is no ``tie_break``.
    """
    if tie_break is not None:
        rank = _strict(rank, comparison, tie_break)
    lists = _side_by_side(scores / temperature, rank, comparison, comparisons, longest)
    same, later = _relations(lists)
    # Each term is -log sigma(-log sum_{i > k} exp(e_i - e_k)), which is exact at any gap; the published code cuts off
    # every tail that lies more than 23 nats below the best score. Differences come before exponentials: scores that are
    # all large would lose digits.
    above = lists.scores[:, None, :] - lists.scores[:, :, None]
    rest = torch.where(later, above, -torch.inf).logsumexp(-1)
    tied = same.sum(-1)
    alone = lists.present & (tied == 1)
    terms = -F.logsigmoid(torch.where(alone, -rest, torch.inf))
    loss = torch.where(alone, terms, 0.0).sum(-1)
    if tie_break is not None:
        return loss
    if not ties:
        return torch.where((tied > 1).any(-1), torch.nan, loss)
    return loss + _tied_terms(above, rest, same, tied)


def random_subsets(noise: Tensor, comparison: Tensor, comparisons: int, size: int) -> Subsets:
    """Draw ``size`` responses of each comparison without replacement.  [g r], [r] -> [m] each

    ``noise`` has a random number per draw and response; the ``size`` smallest of a comparison are drawn, or all of a
    smaller one.
    """
    draws, responses = noise.shape
    draw = torch.arange(draws, device=noise.device)[:, None]
    subset = (draw * comparisons + comparison).flatten()
    order = noise.flatten().argsort()
    place = torch.empty_like(order).scatter_(0, order, position_in_group(subset[order]))
    chosen = (place < size).nonzero().squeeze(-1)
    return Subsets(chosen % responses, subset[chosen])


def ranks_differ(rank: Tensor, comparison: Tensor, comparisons: int) -> Tensor:
    """Whether the responses of a comparison have different ranks.  [r], [r] -> [b] bool"""
    start = rank.new_zeros(comparisons)
    highest = start.scatter_reduce(0, comparison, rank, "amax", include_self=False)
    lowest = start.scatter_reduce(0, comparison, rank, "amin", include_self=False)
    return highest != lowest


def agreement(
    scores: Tensor, rank: Tensor, comparison: Tensor, comparisons: int, *, longest: int | None = None
) -> Agreement:
    """How well the scores of each comparison agree with its ranks.  [r], [r], [r] -> [b] each

    ``longest`` as in :func:`plackett_luce`.
    """
    lists = _side_by_side(scores, rank, comparison, comparisons, longest)
    _, later = _relations(lists)
    right = later & (lists.scores[:, :, None] > lists.scores[:, None, :])
    accuracy = right.sum((1, 2)).to(scores.dtype) / later.sum((1, 2))
    best_rank = torch.where(lists.present, lists.rank, lists.rank.max() + 1).min(-1, keepdim=True).values
    best = lists.present & (lists.rank == best_rank)
    highest = torch.where(best, lists.scores, -torch.inf).max(-1).values
    other = torch.where(lists.present & ~best, lists.scores, -torch.inf).max(-1).values
    members = lists.present.sum(-1)
    mean = lists.scores.sum(-1) / members
    deviation = torch.where(lists.present, lists.scores - mean[:, None], 0.0)
    spread = (deviation.square().sum(-1) / members).sqrt()
    return Agreement(accuracy, (highest > other).to(scores.dtype), spread)


def _side_by_side(
    scores: Tensor, rank: Tensor, comparison: Tensor, comparisons: int, longest: int | None
) -> _Lists:
    """Groups as rows, padded with zeros."""
    place = position_in_group(comparison)
    if longest is None:
        longest = int(segment_sum(torch.ones_like(comparison), comparison, comparisons).max())
    shape = (comparisons, longest)
    where = (comparison, place)
    return _Lists(
        scores.new_zeros(shape).index_put(where, scores),
        rank.new_zeros(shape).index_put(where, rank),
        torch.zeros(shape, dtype=torch.bool, device=rank.device).index_put(
            where, torch.ones_like(place, dtype=torch.bool)
        ),
    )


def _relations(lists: _Lists) -> tuple[Tensor, Tensor]:
    """Whether the second of two responses is tied with the first, and whether it ranks below it.  -> [b k k] each"""
    both = lists.present[:, :, None] & lists.present[:, None, :]
    first, second = lists.rank[:, :, None], lists.rank[:, None, :]
    return both & (second == first), both & (second > first)


def _strict(rank: Tensor, comparison: Tensor, tie_break: Tensor) -> Tensor:
    """Ranks without ties: the place when sorted by comparison, rank and ``tie_break``."""
    order = tie_break.argsort(stable=True)
    order = order[rank[order].argsort(stable=True)]
    return torch.empty_like(order).scatter_(0, order, position_in_group(comparison[order]))


def _tied_terms(above: Tensor, rest: Tensor, same: Tensor, tied: Tensor) -> Tensor:
    """Loss of all ties, each the mean over its orders.  -> [b]

    Args:
        above: ``[b k k]``, score of the second response minus score of the first.
        rest: ``[b k]``, log of the summed exponentials of lower-ranked responses, relative to the response.
        same: ``[b k k]``, whether two responses are tied.
        tied: ``[b k]``, size of the tie that the response belongs to.
    """
    loss = torch.zeros_like(rest[:, 0])
    # Each tie is handled once, at its first member.
    before = torch.ones_like(same[0]).tril(-1)
    first = (tied > 1) & ~(same & before).any(-1)
    for size in tied[first].unique().tolist():
        if size > LARGEST_TIE:
            raise ValueError(f"a tie of {size}; the orders of at most {LARGEST_TIE} can be averaged")
        group, slot = (first & (tied == size)).nonzero(as_tuple=True)
        members = same[group, slot].nonzero()[:, 1].reshape(-1, size)
        values = above[group[:, None], slot[:, None], members]
        loss = loss.index_add(0, group, _mean_over_orders(values, rest[group, slot]))
    return loss


def _mean_over_orders(values: Tensor, rest: Tensor) -> Tensor:
    """Loss of tied responses, averaged over their orders.  [c m], [c] -> [c]

    In a random order, the responses still to come are equally likely to be any subset of their number. So the mean of
    each term is a mean over subsets, and ``m!`` orders reduce to ``2^m`` subsets.

    Args:
        values: Scores of the tied responses.
        rest: Log of the summed exponentials of lower-ranked responses, -inf if there are none.
    """
    size = values.shape[1]
    numbers = torch.arange(1, 2**size, device=values.device)
    inside = (numbers[:, None] >> torch.arange(size, device=values.device)) & 1 == 1
    sizes = inside.sum(-1)
    share = 1.0 / torch.bincount(sizes)[sizes].to(values.dtype)
    chosen = torch.where(inside, values[:, None, :], -torch.inf).logsumexp(-1)
    return (torch.logaddexp(chosen, rest[:, None]) * share).sum(-1) - values.sum(-1)
