"""How learned token rewards agree with planted scores."""

from typing import NamedTuple

import numpy as np

from studies.planted.learning import Cell
from studies.planted.worlds import TYPES, Floats
from tokenward.evaluation.statistics import auroc


def in_ranks(values: Floats) -> Floats:
    """Ranks, with the mean rank for equal values."""
    _, place, times = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(times) - (times - 1) / 2)[place]


def correlation(first: Floats, second: Floats) -> float:
    """Pearson's correlation."""
    return float(np.corrcoef(first, second)[0, 1])


class Credit(NamedTuple):
    """Agreement of the learned token reward with the planted score, on the eval tokens of one seed.

    Attributes:
        pearson: Pearson's correlation over tokens.
        spearman: Spearman's correlation over tokens.
        by_score: Spearman's correlation over distinct planted scores, with the mean reward of each.
        marked: Spearman's correlation over tokens whose score is not 0.
        auroc: AUROC of tokens whose score is not 0 against those whose score is 0.
        running: Pearson's correlation of the reward and the extreme score of the sequence so far, over tokens.
    """

    pearson: float
    spearman: float
    by_score: float
    marked: float
    auroc: float
    running: float


def by_type(cell: Cell) -> tuple[Floats, Floats]:
    """Mean learned reward and planted score of each token type that occurred."""
    times = np.maximum(np.bincount(cell.types, minlength=TYPES), 1e-9)
    seen = times >= 1
    sums = (np.bincount(cell.types, values, TYPES) for values in (cell.learned, cell.planted))
    learned, planted = ((total / times)[seen] for total in sums)
    return learned, planted


def credit(cell: Cell) -> Credit:
    """Compute the agreement with the planted scores."""
    sign = -1.0 if cell.planted.max() <= 0 else 1.0
    marked = cell.planted != 0
    mixed = not marked.all()
    scores, place = np.unique(cell.planted, return_inverse=True)
    means = np.bincount(place, cell.learned) / np.bincount(place)
    by_score = correlation(in_ranks(means), in_ranks(scores)) if len(scores) > 2 else float("nan")
    extreme = np.concatenate(
        [np.maximum.accumulate(part) for part in np.split(sign * cell.planted, np.cumsum(cell.lengths)[:-1])]
    )
    return Credit(
        correlation(cell.learned, cell.planted),
        correlation(in_ranks(cell.learned), in_ranks(cell.planted)),
        by_score,
        correlation(in_ranks(cell.learned[marked]), in_ranks(cell.planted[marked]))
        if mixed and len(np.unique(cell.planted[marked])) > 1
        else float("nan"),
        auroc(sign * cell.learned, marked) if mixed else float("nan"),
        correlation(sign * cell.learned, extreme) if mixed else float("nan"),
    )
