"""Median ratios of paired times, with intervals."""

import random
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple


class Ratio(NamedTuple):
    """A median of paired ratios with its bootstrap interval.

    Attributes:
        value: Median of the ratios of the repetitions.
        low: Lower end of the 95 % interval.
        high: Upper end.
        overall: Ratio of the sums; dominated by long repetitions.
    """

    value: float
    low: float
    high: float
    overall: float


def paired_ratio(
    above: Sequence[float], below: Sequence[float], *, resamples: int = 5000, seed: int = 0
) -> Ratio:
    """Median of ``above / below`` over repetitions that each measured both sides.

    Only numbers of the same repetition are compared, because a machine that is slow for a while slows both sides.
    """
    if not above or len(above) != len(below):
        raise ValueError(f"{len(above)} and {len(below)} measurements cannot be paired")
    ratios = [first / second for first, second in zip(above, below, strict=True)]
    low, high = bootstrap(ratios, resamples=resamples, seed=seed)
    return Ratio(median(ratios), low, high, sum(above) / sum(below))


def bootstrap(values: Sequence[float], *, resamples: int = 5000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the median over repetitions."""
    rng = random.Random(seed)
    medians = sorted(median(rng.choices(values, k=len(values))) for _ in range(resamples))
    return medians[int(0.025 * (resamples - 1))], medians[round(0.975 * (resamples - 1))]


def rise(values: Sequence[float]) -> float:
    """Largest ratio of a later value to an earlier one; at most 1 if the cost never grows."""
    return max(later / earlier for place, earlier in enumerate(values) for later in values[place + 1 :])
