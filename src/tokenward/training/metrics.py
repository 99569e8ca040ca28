"""Sums of what passes say of their comparisons, kept on the device until a step logs."""

from collections.abc import Callable

import torch
from torch import Tensor

from tokenward.objectives.base import Losses

LOSS = "loss/comparison"
"""In what :meth:`MetricSums.take` gives: the loss over the comparisons since the last time."""

_COMPARISONS, _DENOMINATOR = "comparisons", "loss/denominator"
_HAVING = " had"  # after a metric's name: how many of the comparisons have it


class MetricSums:
    """Adds up the metrics of passes; nothing waits for the numbers until they are taken."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, losses: Losses, counts: Tensor) -> None:
        """One pass.

        Args:
            losses: Of its comparisons.
            counts: ``[b]`` bool, which of them count.
        """
        found = {_COMPARISONS: counts, LOSS: losses.loss.detach(), **losses.metrics}
        if losses.denominator is not None:
            found[_DENOMINATOR] = losses.denominator
        for name, having in (losses.having or {}).items():
            found[name] = torch.where(having != 0, found[name], 0.0)
            found[name + _HAVING] = having
        for name, values in found.items():
            total = torch.where(counts, values, torch.zeros_like(values)).sum().float()
            self._sums[name] = self._sums.get(name, torch.zeros((), device=values.device)) + total

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means over the comparisons since the last time that have the metric, and the loss by its own denominator.

        Begins anew. A metric that no comparison had is left out.

        Args:
            reduce: Sums of this process to those of all.
        """
        sums, self._sums = self._sums, {}
        if not sums:
            return {}
        totals = dict(zip(sums, reduce(torch.stack([*sums.values()])).tolist(), strict=True))
        comparisons = totals.pop(_COMPARISONS)
        loss, denominator = totals.pop(LOSS), totals.pop(_DENOMINATOR, comparisons)
        having = {name: totals.pop(name + _HAVING) for name in list(totals) if name + _HAVING in totals}
        means = {
            name: total / having.get(name, comparisons)
            for name, total in totals.items()
            if having.get(name, 1)
        }
        return {LOSS: loss / denominator if denominator else 0.0, **means}
