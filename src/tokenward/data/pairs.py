"""Pairs out of ranked lists: which responses of a comparison are set against each other."""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from itertools import combinations, pairwise

from tokenward.data.prepare import comparison_key, whole_turns
from tokenward.errors import UserError
from tokenward.types import Comparison

# Places of responses, the preferred first; given the places from best to worst, ties in the data's order.
Rule = Callable[[Sequence[int], Sequence[int]], list[tuple[int, int]]]


def pairs(comparison: Comparison, rule: str, *, min_gap: float | None = None) -> list[Comparison]:
    """The pairs of a comparison, each a comparison of two responses with ranks (0, 1), best first.

    Args:
        comparison: K responses with ranks.
        rule: ``best_worst``: the best against the worst, of a tie the earliest; ``all``: any two of different
            rank; ``adjacent``: neighbours in rank order, if of different rank.
        min_gap: Leave out pairs whose scores differ by less, in units of the scores.

    Raises:
        UserError: There is no such rule, or ``min_gap`` is negative or the data hold no scores.
    """
    return [pair_of(comparison, *places) for places in pair_places(comparison, rule, min_gap=min_gap)]


def pair_places(comparison: Comparison, rule: str, *, min_gap: float | None = None) -> list[tuple[int, int]]:
    """Which responses :func:`pairs` sets against each other: the places of the better and the worse."""
    if rule not in RULES:
        near = get_close_matches(rule, RULES, n=1)
        advice = f" Did you mean {near[0]}?" if near else ""
        raise UserError(f"data.pairs: {rule} is no rule.{advice} Rules are: {', '.join(RULES)}.")
    order = sorted(range(len(comparison.ranks)), key=comparison.ranks.__getitem__)
    if len(order) < 2:
        return []
    chosen = [
        (b, w) for b, w in RULES[rule](order, comparison.ranks) if comparison.ranks[b] < comparison.ranks[w]
    ]
    if min_gap is None:
        return chosen
    scores = _scores(comparison, min_gap)
    return [(better, worse) for better, worse in chosen if scores[better] - scores[worse] >= min_gap]


def _best_worst(order: Sequence[int], ranks: Sequence[int]) -> list[tuple[int, int]]:
    return [(order[0], ranks.index(max(ranks)))]


def _all(order: Sequence[int], ranks: Sequence[int]) -> list[tuple[int, int]]:
    return list(combinations(order, 2))


def _adjacent(order: Sequence[int], ranks: Sequence[int]) -> list[tuple[int, int]]:
    return list(pairwise(order))


RULES: dict[str, Rule] = {"best_worst": _best_worst, "all": _all, "adjacent": _adjacent}


def _scores(comparison: Comparison, min_gap: float) -> Sequence[float]:
    if not min_gap >= 0:
        raise UserError(f"data.min_gap must not be negative, got {min_gap}.")
    if comparison.scores is None:
        problem = f"data.min_gap: {min_gap}: {comparison.source} has no scores to measure a gap by"
        raise UserError(f"{problem}. Leave min_gap out, or use data with scores.")
    return comparison.scores


def pair_of(comparison: Comparison, better: int, worse: int) -> Comparison:
    """The comparison of two of its responses, given by their places."""
    responses = (comparison.responses[better], comparison.responses[worse])
    scores, spans, turns = comparison.scores, comparison.spans, comparison.turns
    both = None if turns is None else whole_turns((turns[better], turns[worse]))
    return Comparison(
        key=comparison_key(comparison.prompt, responses, turns=both, tools=comparison.tools),
        prompt=comparison.prompt,
        responses=responses,
        ranks=(0, 1),
        source=comparison.source,
        scores=None if scores is None else (scores[better], scores[worse]),
        spans=None if spans is None else (spans[better], spans[worse]),
        turns=both,
        tools=comparison.tools,
    )
