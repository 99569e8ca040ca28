"""Figures with bootstrap intervals, and ranking statistics that handle ties."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenward.artifacts import content_of, read_json, write_json

Floats = NDArray[np.float64]


class Figure(NamedTuple):
    """A measured number.

    Attributes:
        value: The estimate.
        low: Lower end of the 95 % bootstrap interval.
        high: Upper end.
        n: Number of examples.
    """

    value: float
    low: float
    high: float
    n: int


Figures = dict[str, Figure]


def figure_as_json(figure: Figure) -> dict[str, float | int | None]:
    """A figure for ``metrics.json``. JSON has no NaN, so the values of a figure without examples are null."""
    return {name: None if value != value else value for name, value in figure._asdict().items()}


def write_figures(path: Path, figures: Figures) -> None:
    """Write figures by name as JSON."""
    write_json(path, {name: figure_as_json(figure) for name, figure in figures.items()}, ascii=True)


def load_figures(path: Path) -> Figures:
    """Read the figures that :func:`write_figures` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    nan = float("nan")

    def read(file: Path) -> Figures:
        return {
            name: Figure(
                *(nan if item[key] is None else item[key] for key in Figure._fields[:3]), n=item["n"]
            )
            for name, item in read_json(file).items()
        }

    return content_of(path, read)


def no_figure(n: int = 0) -> Figure:
    """The figure of a quantity that is not defined."""
    nan = float("nan")
    return Figure(nan, nan, nan, n)


def mean_figure(values: ArrayLike, *, resamples: int = 2000, seed: int = 0) -> Figure:
    """Mean with a 95 % percentile bootstrap interval. For a paired comparison pass the differences.

    Args:
        values: ``[n]``, one per example.
        resamples: Number of bootstrap draws.
        seed: Seed of the draws.
    """
    data = np.asarray(values, dtype=np.float64)
    if not len(data):
        return no_figure()
    draws = np.random.default_rng(seed).integers(0, len(data), size=(resamples, len(data)))
    low, high = np.quantile(data[draws].mean(axis=1), [0.025, 0.975])
    return Figure(float(data.mean()), float(low), float(high), len(data))


def before_after_figures(
    name: str, before: Sequence[float], after: Sequence[float], *, resamples: int = 2000, seed: int = 0
) -> Figures:
    """A quantity before and after training on the same prompts, and its paired change."""
    first, second = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    sides = {"before": first, "after": second, "change": second - first}
    return {
        f"{name}/{side}": mean_figure(values, resamples=resamples, seed=seed)
        for side, values in sides.items()
    }


def auroc(scores: ArrayLike, positive: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Probability that a positive scores above a negative, a tie counting half; NaN if one kind is missing.

    Args:
        scores: ``[n]``.
        positive: ``[n]`` bool.
        weights: ``[n]``, how often each counts; None is once.
    """
    return _area(*_Ranking(scores, positive).levels(weights))


def average_precision(scores: ArrayLike, positive: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Precision at each distinct score, weighted by the number of positives there; NaN without positives.

    Equal scores are one threshold, so the order of tokens does not matter. Chance is the share of positives.

    Args:
        scores: ``[n]``.
        positive: ``[n]`` bool.
        weights: ``[n]``, how often each counts; None is once.
    """
    return _mean_precision(*_Ranking(scores, positive).levels(weights))


class _Ranking:
    """Examples sorted by score once, to count them with many weights."""

    def __init__(self, scores: ArrayLike, positive: ArrayLike) -> None:
        data = np.asarray(scores, dtype=np.float64)
        self.order = np.argsort(data, kind="stable")
        self.positive = np.asarray(positive, dtype=bool)[self.order]
        new = np.diff(data[self.order], prepend=data[self.order][:1]) > 0
        self.level = np.cumsum(new).astype(np.int64)

    def levels(self, weights: ArrayLike | None = None) -> tuple[Floats, Floats]:
        """Number of positives and of negatives with each distinct score, in ascending order."""
        count = int(self.level[-1]) + 1 if len(self.level) else 0
        mine = np.ones(len(self.order)) if weights is None else np.asarray(weights, np.float64)[self.order]
        up, down = (
            np.bincount(self.level, mine * kind, count).astype(np.float64)
            for kind in (self.positive, ~self.positive)
        )
        return up, down


def _area(up: Floats, down: Floats) -> float:
    below = np.cumsum(down) - down
    pairs = up.sum() * down.sum()
    return float((up * (below + down / 2)).sum() / pairs) if pairs else float("nan")


def _mean_precision(up: Floats, down: Floats) -> float:
    up, down = up[::-1], down[::-1]
    taken = np.cumsum(up + down)
    precision = np.cumsum(up) / np.where(taken > 0, taken, 1.0)
    return float((up * precision).sum() / up.sum()) if up.sum() else float("nan")


LabelledScores = tuple[ArrayLike, ArrayLike, ArrayLike]
"""``scores`` ``[n]`` of tokens, ``positive`` ``[n]`` bool, and ``example`` ``[n]``, the index of each token's response."""


def ranking_figure(
    name: Literal["auroc", "average_precision"],
    scored: Sequence[LabelledScores],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Figure:
    """Mean of several AUROCs or average precisions, without those that are NaN. The bootstrap draws whole responses.

    ``n`` counts the responses with a token in any of ``scored``.

    Args:
        name: The statistic.
        scored: One entry for each statistic, over the same responses; a draw is the same for all of them.
        resamples: Number of bootstrap draws.
        seed: Seed of the draws.
    """
    measure = {"auroc": _area, "average_precision": _mean_precision}[name]
    rankings = [_Ranking(scores, positive) for scores, positive, _ in scored]
    found, places = np.unique(
        np.concatenate([np.ravel(example) for *_, example in scored]), return_inverse=True
    )
    owners = np.split(places, np.cumsum([np.size(example) for *_, example in scored])[:-1])

    def value(times: Floats) -> float:
        each = [
            measure(*ranking.levels(times[owner])) for ranking, owner in zip(rankings, owners, strict=True)
        ]
        known = [one for one in each if not np.isnan(one)]
        return float(np.mean(known)) if known else float("nan")

    return by_example(value, len(found), resamples=resamples, seed=seed)


def by_example(value: Callable[[Floats], float], count: int, *, resamples: int, seed: int) -> Figure:
    """Any statistic with a 95 % percentile bootstrap interval over examples.

    Args:
        value: The statistic, as a function of how often each example counts, ``[count]``. NaN draws are ignored.
        count: Number of examples.
        resamples: Number of bootstrap draws.
        seed: Seed of the draws.
    """
    if not count:
        return no_figure()
    rng, even = np.random.default_rng(seed), np.full(count, 1 / count)
    draws = [value(rng.multinomial(count, even).astype(np.float64)) for _ in range(resamples)]
    low, high = np.nanquantile(draws, [0.025, 0.975]) if not np.all(np.isnan(draws)) else (np.nan, np.nan)
    return Figure(value(np.ones(count)), float(low), float(high), count)


def precision_at_k(scores: ArrayLike, positive: ArrayLike, k: int | None = None) -> float:
    """Share of positives among the k highest scores; NaN without positives.

    Ties at the k-th score count by their share of positives, so the order of tokens does not matter.

    Args:
        scores: ``[n]``.
        positive: ``[n]`` bool.
        k: How many scores, at most n; None is the number of positives.
    """
    data, label = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    if not label.any():
        return float("nan")
    k = min(k or int(label.sum()), len(data))
    border = np.sort(data)[-k]
    above, at = data > border, data == border
    return float((label[above].sum() + (k - above.sum()) * label[at].mean()) / k)
