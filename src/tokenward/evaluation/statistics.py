"""Figures with an interval: bootstrap over examples; AUROC, average precision and precision at k, with ties."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenward.artifacts import read_json, write_json

Floats = NDArray[np.float64]


class Figure(NamedTuple):
    """A measured number.

    Attributes:
        value: The estimate.
        low: Lower end of the 95 % bootstrap interval.
        high: Upper end.
        n: Examples behind it.
    """

    value: float
    low: float
    high: float
    n: int


Figures = dict[str, Figure]


def figure_as_json(figure: Figure) -> dict[str, float | int | None]:
    """A figure as ``metrics.json`` has it: JSON has no NaN, so a figure without examples is null with n = 0."""
    return {name: None if value != value else value for name, value in figure._asdict().items()}


def write_figures(path: Path, figures: Figures) -> None:
    """Write figures by name as JSON."""
    write_json(path, {name: figure_as_json(figure) for name, figure in figures.items()}, ascii=True)


def load_figures(path: Path) -> Figures:
    """What :func:`write_figures` wrote."""
    nan = float("nan")
    return {
        name: Figure(
            *(nan if item[key] is None else item[key] for key in ("value", "low", "high")), n=item["n"]
        )
        for name, item in read_json(path).items()
    }


def mean_figure(values: ArrayLike, *, resamples: int = 2000, seed: int = 0) -> Figure:
    """Mean with a 95 % percentile bootstrap interval; for a paired comparison pass the differences.

    Args:
        values: ``[n]``, one per example.
        resamples: Bootstrap draws.
        seed: Of the draws.
    """
    data = np.asarray(values, dtype=np.float64)
    if not len(data):
        return Figure(float("nan"), float("nan"), float("nan"), 0)
    draws = np.random.default_rng(seed).integers(0, len(data), size=(resamples, len(data)))
    low, high = np.quantile(data[draws].mean(axis=1), [0.025, 0.975])
    return Figure(float(data.mean()), float(low), float(high), len(data))


def before_after_figures(
    name: str, before: Sequence[float], after: Sequence[float], *, resamples: int = 2000, seed: int = 0
) -> Figures:
    """A quantity before and after training on the same prompts, and the paired change."""
    first, second = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    settings = {"resamples": resamples, "seed": seed}
    return {
        f"{name}/before": mean_figure(first, **settings),
        f"{name}/after": mean_figure(second, **settings),
        f"{name}/change": mean_figure(second - first, **settings),
    }


def auroc(scores: ArrayLike, positive: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Chance that a positive scores above a negative, a tie counting half; NaN if one kind is missing.

    Args:
        scores: ``[n]``.
        positive: ``[n]`` bool.
        weights: ``[n]`` how often each counts; 1 if not given.
    """
    return _area(_levels(*_sorted(scores, positive), weights))


def average_precision(scores: ArrayLike, positive: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Precision at each score, weighted by the positives found there; NaN without any.

    Equal scores are one threshold, so the order of tokens plays no part. Chance is the share of positives.

    Args:
        scores: ``[n]``.
        positive: ``[n]`` bool.
        weights: ``[n]`` how often each counts; 1 if not given.
    """
    return _mean_precision(_levels(*_sorted(scores, positive), weights))


class _Order(NamedTuple):
    order: NDArray[np.int64]
    tie: NDArray[np.int64]


def _sorted(scores: ArrayLike, positive: ArrayLike) -> tuple[_Order, NDArray[np.bool_]]:
    data = np.asarray(scores, dtype=np.float64)
    order = np.argsort(data, kind="stable")
    tie = (
        np.concatenate([[0], np.cumsum(np.diff(data[order]) > 0)])
        if len(data)
        else np.zeros(0, dtype=np.int64)
    )
    return _Order(order, tie.astype(np.int64)), np.asarray(positive, dtype=bool)


class _Levels(NamedTuple):
    """How many positives and negatives have each different score, the lowest first."""

    positives: Floats
    negatives: Floats


def _levels(sort: _Order, positive: NDArray[np.bool_], weights: ArrayLike | None) -> _Levels:
    counts = np.ones(len(positive)) if weights is None else np.asarray(weights, dtype=np.float64)
    mine, label = counts[sort.order], positive[sort.order]
    levels = int(sort.tie[-1]) + 1 if len(mine) else 0
    up, down = (np.bincount(sort.tie, mine * kind, levels).astype(np.float64) for kind in (label, ~label))
    return _Levels(up, down)


def _area(levels: _Levels) -> float:
    up, down = levels
    below = np.cumsum(down) - down
    pairs = up.sum() * down.sum()
    return float((up * (below + down / 2)).sum() / pairs) if pairs else float("nan")


def _mean_precision(levels: _Levels) -> float:
    up, down = levels.positives[::-1], levels.negatives[::-1]
    taken = np.cumsum(up + down)
    precision = np.cumsum(up) / np.where(taken > 0, taken, 1.0)
    return float((up * precision).sum() / up.sum()) if up.sum() else float("nan")


LabelledScores = tuple[ArrayLike, ArrayLike, ArrayLike]
"""``scores`` ``[n]`` of tokens, ``positive`` ``[n]`` bool, and ``example`` ``[n]``: the response of each token, from 0."""


def mean_auroc_figure(scored: Sequence[LabelledScores], *, resamples: int = 2000, seed: int = 0) -> Figure:
    """Mean of the AUROCs that exist, with an interval by example: whole responses are drawn, not tokens.

    Args:
        scored: One for each AUROC, over the same responses; a draw is the same for all of them.
        resamples: Bootstrap draws.
        seed: Of the draws.
    """
    return _mean_ranking(_area, scored, resamples=resamples, seed=seed)


def mean_average_precision_figure(
    scored: Sequence[LabelledScores], *, resamples: int = 2000, seed: int = 0
) -> Figure:
    """Mean of several average precisions, as :func:`mean_auroc_figure` is of AUROCs."""
    return _mean_ranking(_mean_precision, scored, resamples=resamples, seed=seed)


def _mean_ranking(
    measure: Callable[[_Levels], float], scored: Sequence[LabelledScores], *, resamples: int, seed: int
) -> Figure:
    prepared = [(*_sorted(scores, positive), np.asarray(example)) for scores, positive, example in scored]
    count = max((int(owner.max()) + 1 for _, _, owner in prepared if len(owner)), default=0)

    def value(times: Floats) -> float:
        found = [measure(_levels(sort, label, times[owner])) for sort, label, owner in prepared]
        known = [one for one in found if not np.isnan(one)]
        return float(np.mean(known)) if known else float("nan")

    return by_example(value, count, resamples=resamples, seed=seed)


def by_example(value: Callable[[Floats], float], count: int, *, resamples: int, seed: int) -> Figure:
    """A figure of any statistic, with a 95 % percentile bootstrap interval over examples.

    Args:
        value: The statistic, given how often each example counts, ``[count]``; NaN draws are left out.
        count: Examples.
        resamples: Bootstrap draws.
        seed: Of the draws.
    """
    if not count:
        return Figure(float("nan"), float("nan"), float("nan"), 0)
    rng = np.random.default_rng(seed)
    draws = [
        value(rng.multinomial(count, np.full(count, 1 / count)).astype(np.float64)) for _ in range(resamples)
    ]
    low, high = np.nanquantile(draws, [0.025, 0.975]) if not np.all(np.isnan(draws)) else (np.nan, np.nan)
    return Figure(value(np.ones(count)), float(low), float(high), count)


def precision_at_k(scores: ArrayLike, positive: ArrayLike, k: int | None = None) -> float:
    """Share of positives among the k highest scores; NaN without any positive.

    Ties at the border count by their share, so that the order of tokens plays no part.

    Args:
        scores: ``[n]``.
        positive: ``[n]`` bool.
        k: How many are looked at, at most n; None is the number of positives.
    """
    data, label = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    if not label.any():
        return float("nan")
    k = min(k or int(label.sum()), len(data))
    border = np.sort(data)[-k]
    above, at = data > border, data == border
    return float((label[above].sum() + (k - above.sum()) * label[at].mean()) / k)
