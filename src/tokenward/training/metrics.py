"""Metrics summed on the device until a step logs, and the warning about displaced likelihood."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Args

from tokenward.objectives.base import Losses

CHANGE, LEVEL = "logps/chosen_change_per_token", "logps/chosen_per_token"
"""Metrics of objectives: the change against the reference if they have one, else the level, whose first value is the start."""

SMOOTHED = 3
"""Number of logged values to average before comparing with the start, since each is over different comparisons."""


class Change(NamedTuple):
    """Change of the chosen responses' log-probability since the start, in nats per token.

    Attributes:
        step: Number of updates.
        value: Mean of the latest logged values.
        settled: Whether the value is meaningful. A change against a reference always is; a level is over different
            comparisons than the start, so it takes ``SMOOTHED`` of them.
    """

    step: int
    value: float
    settled: bool


class Changes:
    """Follows the chosen responses' log-probability through a training log.

    Only tokens with weight count, since the log-probability of others is not computed.
    """

    def __init__(self) -> None:
        self._start: float | None = None
        self._recent: deque[float] = deque(maxlen=SMOOTHED)

    def add(self, entry: Mapping[str, Any]) -> Change | None:
        """The change after one more log entry (as in ``trainer_state.json``); None if it has no chosen responses."""
        if CHANGE in entry:
            value = entry[CHANGE]
        elif LEVEL in entry:
            self._start = entry[LEVEL] if self._start is None else self._start
            value = entry[LEVEL] - self._start
        else:
            return None
        self._recent.append(value)
        settled = CHANGE in entry or len(self._recent) == SMOOTHED
        return Change(int(entry["step"]), fmean(self._recent), settled)

    def of(self, history: Sequence[Mapping[str, Any]]) -> list[Change]:
        """The change after each entry that has one."""
        return [change for entry in history if (change := self.add(entry)) is not None]


def displacement_facts(history: Sequence[Mapping[str, Any]], margin: float | None) -> dict[str, Any]:
    """Displacement of a finished training: ``{"displacement": {...}}``, or nothing if it was not logged.

    ``last`` and ``lowest`` are changes in nats per token; ``warned_at`` is the update of the warning, or None.
    """
    found = Changes().of(history)
    if not found:
        return {}
    facts = {
        "last": found[-1].value,
        "lowest": min(change.value for change in found),
        "margin": margin,
        "warned_at": next((change.step for change in found if _displaced(change, margin)), None),
    }
    return {"displacement": facts}


def _displaced(change: Change, margin: float | None) -> bool:
    return margin is not None and change.settled and change.value < -margin


class DisplacementAlarm(TrainerCallback):
    """Warns once if the chosen responses have become less likely by more than a margin.

    It reads only what a step logs, so it needs no extra forward pass. A resumed training does not warn again. ``warn`` is
    called with the message, in which ``where`` is the key of the training table.
    """

    def __init__(self, margin: float | None, where: str, warn: Callable[[str], None]) -> None:
        self._margin, self._where, self._warn = margin, where, warn
        self._changes, self._warned = Changes(), False

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        self._changes = Changes()
        before = self._changes.of(state.log_history)
        self._warned = any(_displaced(change, self._margin) for change in before)

    def on_log(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        change = self._changes.add(state.log_history[-1])
        if self._margin is None or self._warned or change is None or not _displaced(change, self._margin):
            return
        self._warned = True
        if state.is_world_process_zero:
            self._warn(_message(change, self._margin, self._where))


def _message(change: Change, margin: float, where: str) -> str:
    return (
        f"  warning, displacement: at update {change.step} the chosen responses are {-change.value:.2f} nats per token less likely "
        f"than at the start (over tokens with weight; the warning is at {margin:g}). Accuracies and margins may still rise, but "
        "probability moves from the preferred replies to replies that nobody compared, so look at the model's replies before "
        f"you trust it. What helps: a lower {where}.learning_rate or fewer updates, an sft stage before this one, a smaller "
        f"share of rejected tokens; with dpo, a larger beta. {where}.displacement_margin sets the warning, null turns it off."
    )


LEAST_FALL = 0.01
"""A loss that has fallen by a smaller part of its first value has taught next to nothing."""


def flat_loss_warning(history: Sequence[Mapping[str, Any]], learning_rate: float, where: str) -> str:
    """A warning if a loss that compares responses has hardly fallen; empty if it has, or was logged fewer than four times.

    Args:
        history: What was logged.
        learning_rate: The highest one.
        where: Key of the training table.
    """
    compared = [entry for entry in history if entry.keys() & {"rewards/accuracies", "rank/accuracy"}]
    losses = [float(entry["loss"]) for entry in compared if "loss" in entry]
    last = fmean(losses[-max(len(losses) // 4, 1) :]) if losses else 0.0
    if len(losses) < 4 or last <= losses[0] * (1 - LEAST_FALL):
        return ""
    return (
        f"  warning: the loss went from {losses[0]:.4f} to {last:.4f}, so the model has learned next to nothing of the preference, and what is "
        f"made with it will be noise. Raise {where}.learning_rate ({learning_rate:g}), or train for longer. The smaller a model, the "
        "higher its rate: some 1e-3 for a million weights, 1e-4 for a hundred million, 1e-5 for billions."
    )


LOSS = "loss/comparison"
"""Key of the mean loss in what :meth:`MetricSums.take` returns."""

_COMPARISONS, _DENOMINATOR = "comparisons", "loss/denominator"
_HAVING = " had"  # suffix: how many comparisons have a metric


class MetricSums:
    """Sums metrics over passes on the device; nothing waits for the numbers until they are taken."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, losses: Losses, counts: Tensor) -> None:
        """Add the losses and metrics of a pass; ``counts`` says which comparisons count.  [b] bool"""
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
        """Mean of each metric over the comparisons that have it since the last call, and starts again.

        The loss is divided by the objective's own denominator. A metric that no comparison had is left out. ``reduce``
        sums a tensor over processes.
        """
        sums, self._sums = self._sums, {}
        if not sums:
            return {}
        # One transfer and one exchange between processes for all metrics.
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
