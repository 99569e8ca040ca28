"""What the scores of a run look like on the whole: by side, position, kind of token, and token."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tokenward.report.pairs import ScoredPair, scores_of
from tokenward.report.pieces import eos_count, pieces, token_class
from tokenward.scoring.scorers import Scorer

SIDES = ("chosen", "rejected")
BOTH = "both"
POSITIONS = 10
BINS = 41
LISTED = 15
LEAST_SEEN = 5
"""A token is listed when it was seen so often: a mean over fewer says little."""


class MeanScore(NamedTuple):
    """Mean score of some tokens, by side; None where a side has none."""

    label: str
    chosen: float | None
    rejected: float | None
    n: int


class TokenMean(NamedTuple):
    """Mean score of a token over all its occurrences on both sides."""

    text: str
    mean: float
    n: int


@dataclass(frozen=True)
class Summary:
    """Distributions of a run's scores over some of its pairs.

    Attributes:
        pairs: How many pairs.
        edges: ``[bins + 1]``, of the histogram; what lies outside counts in the first or last bin.
        sides: Share of each side's tokens per bin.
        positions: Mean score by tenth of the response.
        classes: Mean score by kind of token.
        raised: Tokens with the highest mean.
        lowered: Tokens with the lowest mean.
    """

    pairs: int
    edges: list[float]
    sides: dict[str, list[float]]
    positions: list[MeanScore]
    classes: list[MeanScore]
    raised: list[TokenMean]
    lowered: list[TokenMean]


@dataclass
class _Sums:
    """Sums of scores by side and group."""

    total: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    count: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))

    def add(self, label: str, side: str, score: float) -> None:
        self.total[label, side] += score
        self.count[label, side] += 1

    def means(self, labels: Sequence[str]) -> list[MeanScore]:
        return [
            MeanScore(
                label,
                *(self._mean(label, side) for side in SIDES),
                n=sum(self.count[label, side] for side in SIDES),
            )
            for label in labels
        ]

    def _mean(self, label: str, side: str) -> float | None:
        count = self.count[label, side]
        return self.total[label, side] / count if count else None


def summarise(
    sample: Sequence[ScoredPair], scorer: Scorer, *, limit: float, zero: float, names: dict[int, str]
) -> Summary:
    """Distributions of the scores of some pairs.

    Args:
        sample: The pairs.
        scorer: The run's scorer.
        limit: Half the width of the histogram.
        zero: Its middle.
        names: Of tokens that are no text, by id.
    """
    by_side: dict[str, list[np.ndarray]] = {side: [] for side in SIDES}
    position, kind, token = _Sums(), _Sums(), _Sums()
    for pair in sample:
        for side, text, record in zip(SIDES, pair.comparison.responses, pair.records, strict=True):
            scores = scores_of(scorer, record)
            by_side[side].append(scores)
            shown, size = pieces(text, record, names), len(record.ids)
            first_eos = size - eos_count(text, record)
            for place, (piece, score) in enumerate(zip(shown, scores.tolist(), strict=True)):
                if score == score:  # one without a score has no part in a mean
                    position.add(str(place * POSITIONS // size), side, score)
                    kind.add(token_class(piece, eos=place >= first_eos), side, score)
                    token.add(piece, BOTH, score)
    edges = np.linspace(zero - limit, zero + limit, BINS + 1)
    raised, lowered = _halves(token)
    return Summary(
        pairs=len(sample),
        edges=edges.tolist(),
        sides={side: _shares(parts, edges) for side, parts in by_side.items()},
        positions=[
            mean._replace(label=f"{int(mean.label) * 100 // POSITIONS} %")
            for mean in position.means([str(tenth) for tenth in range(POSITIONS)])
        ],
        classes=kind.means(sorted({label for label, _ in kind.count})),
        raised=raised,
        lowered=lowered,
    )


def _shares(parts: Sequence[np.ndarray], edges: np.ndarray) -> list[float]:
    values = np.concatenate(parts)
    values = values[~np.isnan(values)].clip(edges[0], edges[-1])
    return (np.histogram(values, edges)[0] / max(len(values), 1)).tolist()


def _halves(token: _Sums) -> tuple[list[TokenMean], list[TokenMean]]:
    """The tokens with the highest means and those with the lowest; of few tokens half each, so that none is in both."""
    listed = _listed(token)
    middle = len(listed) // 2
    return listed[middle:][::-1][:LISTED], listed[:middle][:LISTED]


def _listed(token: _Sums) -> list[TokenMean]:
    """Tokens that were seen often enough, the lowest mean first."""
    found = [
        TokenMean(text, token.total[text, BOTH] / n, n)
        for (text, _), n in token.count.items()
        if n >= LEAST_SEEN and text
    ]
    return sorted(found, key=lambda item: (item.mean, item.text))
