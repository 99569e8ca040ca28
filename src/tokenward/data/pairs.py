"""Which responses of a ranked comparison form pairs."""

from collections.abc import Callable, Sequence
from itertools import combinations, pairwise

from tokenward.data.fields import unknown_name
from tokenward.data.prepare import with_responses
from tokenward.errors import UserError
from tokenward.types import Comparison

Places = list[tuple[int, int]]

# Each rule gets the positions of the responses from best to worst (ties in the order of the data) and their ranks.
RULES: dict[str, Callable[[Sequence[int], Sequence[int]], Places]] = {
    "best_worst": lambda order, ranks: [(order[0], ranks.index(max(ranks)))],
    "all": lambda order, ranks: list(combinations(order, 2)),
    "adjacent": lambda order, ranks: list(pairwise(order)),
}


def pair_places(comparison: Comparison, rule: str, *, min_gap: float | None = None) -> Places:
    """The pairs of a comparison, each as the positions of the better and the worse response.

    Args:
        comparison: K responses with ranks.
        rule: ``best_worst``: the best and the worst, the earliest in a tie; ``all``: any two of different rank;
            ``adjacent``: neighbors in the order of ranks, if their ranks differ.
        min_gap: Leave out pairs whose scores differ by less.

    Raises:
        UserError: The rule is unknown, ``min_gap`` is negative, or the data has no scores.
    """
    chosen = ranked_places(comparison.ranks, rule)
    if min_gap is None or len(comparison.ranks) < 2:
        return chosen
    scores = _scores(comparison, min_gap)
    return [(better, worse) for better, worse in chosen if scores[better] - scores[worse] >= min_gap]


def ranked_places(ranks: Sequence[int], rule: str) -> Places:
    """:func:`pair_places` of responses with these ranks, whatever their scores.

    Raises:
        UserError: The rule is unknown.
    """
    if rule not in RULES:
        raise unknown_name(rule, "a rule for pairs", RULES, key="data.pairs")
    if len(ranks) < 2:
        return []
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    return [(better, worse) for better, worse in RULES[rule](order, ranks) if ranks[better] < ranks[worse]]


def _scores(comparison: Comparison, min_gap: float) -> Sequence[float]:
    if not min_gap >= 0:
        raise UserError(
            f"min_gap must not be negative, got {min_gap}.", code="out-of-range", key="data.min_gap"
        )
    if comparison.scores is None:
        raise UserError(
            f"min_gap is {min_gap}, but {comparison.source} has no scores. Leave min_gap out, or use data with scores.",
            code="missing-scores",
            key="data.min_gap",
        )
    return comparison.scores


def pair_of(comparison: Comparison, better: int, worse: int) -> Comparison:
    """The comparison of two responses, given by their positions."""
    return with_responses(comparison, (better, worse), (0, 1), comparison.source)
