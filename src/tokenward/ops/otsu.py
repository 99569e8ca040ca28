# torch leaves parts of what is used here untyped.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
"""Multi-Otsu: cut numbers into classes so that the classes' means lie as far apart as they can."""

import torch
from torch import Tensor

BINS = 256
"""Numbers with more different values than this are counted in so many equal bins first."""


def otsu_cuts(values: Tensor, classes: int, *, bins: int = BINS) -> Tensor:
    """Cuts between the classes of numbers, ascending: a number at a cut belongs above it.  [n] -> [classes - 1] float64

    The cuts make the variance between classes the largest possible (Otsu, 1979; for several classes Liao,
    Chen and Chung, 2001): exactly so where there are at most ``bins`` different values, else for the histogram.
    With fewer different values than classes the upper cuts are infinite and the upper classes empty.

    Args:
        values: The numbers; those that are not finite are left out.
        classes: How many, at least 2.
        bins: See the module.
    """
    values = values[values.isfinite()].double()
    cuts = torch.full((classes - 1,), torch.inf, dtype=torch.float64, device=values.device)
    levels, counts, edges = _histogram(values, bins)
    found = _best_ends(levels, counts, min(classes, len(levels))) if len(levels) else []
    for number, last in enumerate(found):
        cuts[number] = edges[last]
    return cuts


def _histogram(values: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Levels that occur, how often, and the edge above each but the last.  [levels], [levels], [levels - 1]"""
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
    """Last level of each class but the last, by dynamic programming over all places to cut."""
    size = len(levels)
    number, total = (torch.cat((part.new_zeros(1), part.cumsum(0))) for part in (counts, counts * levels))
    # share[i, j]: what a class of the levels i..j adds to the variance between classes, up to a constant.
    weight, mass = number[None, 1:] - number[:-1, None], total[None, 1:] - total[:-1, None]
    inside = torch.ones_like(weight, dtype=torch.bool).triu()
    share = torch.where(inside, mass.square() / torch.where(inside, weight, 1.0), -torch.inf)
    best, ends = share[0], list[Tensor]()
    for _ in range(classes - 1):
        # The class before ends at i - 1, this one goes from i to j.
        reach = best[:-1, None] + share[1:]
        best, where = reach.max(0)
        ends.append(where)
    cuts = [size - 1]
    for where in reversed(ends):
        cuts.append(int(where[cuts[-1]]))
    return sorted(cuts)[:-1]


def otsu_class(values: Tensor, cuts: Tensor) -> Tensor:
    """Which class each number belongs to, 0 the lowest; NaN belongs to none and gets -1.  [n], [c - 1] -> [n]"""
    place = torch.bucketize(values.double(), cuts, right=True)
    return torch.where(values.isnan(), -1, place)
