"""Ratios of paired times: the median, and how sure it is."""

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
        overall: Ratio of the sums, which long repetitions dominate.
    """

    value: float
    low: float
    high: float
    overall: float


def paired_ratio(
    above: Sequence[float], below: Sequence[float], *, resamples: int = 5000, seed: int = 0
) -> Ratio:
    """Median of ``above / below`` over repetitions, each of which measured both sides.

    Only the two numbers of one repetition are ever compared: a machine that slows down for a while slows both.
    """
    if not above or len(above) != len(below):
        raise ValueError(f"{len(above)} and {len(below)} measurements cannot be paired")
    ratios = [first / second for first, second in zip(above, below, strict=True)]
    low, high = bootstrap(ratios, resamples=resamples, seed=seed)
    return Ratio(median(ratios), low, high, sum(above) / sum(below))


def bootstrap(values: Sequence[float], *, resamples: int = 5000, seed: int = 0) -> tuple[float, float]:
    """Percentile 95 % interval of the median under resampling of the repetitions."""
    rng = random.Random(seed)
    medians = sorted(median(rng.choices(values, k=len(values))) for _ in range(resamples))
    return medians[int(0.025 * (resamples - 1))], medians[round(0.975 * (resamples - 1))]


def rise(values: Sequence[float]) -> float:
    """Largest ratio of a later value to an earlier one: 1 or less where a cost per piece never grows.

    A cost that falls, because what is paid once is shared by more pieces, is no growth.
    """
    return max(later / earlier for place, earlier in enumerate(values) for later in values[place + 1 :])
