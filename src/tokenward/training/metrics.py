"""Metrics summed on the device until a step logs, and the alarm for displaced likelihood."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokenward.objectives.base import Losses

CHANGE, LEVEL = "logps/chosen_change_per_token", "logps/chosen_per_token"
"""What objectives log: against the reference, where they have one; else the level, whose first value is the start."""

SMOOTHED = 3
"""Logged values whose mean is compared with the start: each is of other comparisons."""


class Change(NamedTuple):
    """The chosen responses' log-probability against its start after some updates, nats per token.

    Attributes:
        step: After which update.
        value: Mean of the last logged values.
        settled: Whether it says something: against a reference each value does; a level is of other comparisons than
            the start's, so a few of them must be there.
    """

    step: int
    value: float
    settled: bool


class Changes:
    """Follows the chosen responses' log-probability through what a training logs.

    It is over the tokens that have weight, since no other's log-probability is computed.
    """

    def __init__(self) -> None:
        self._start: float | None = None
        self._recent: deque[float] = deque(maxlen=SMOOTHED)

    def add(self, entry: Mapping[str, Any]) -> Change | None:
        """The change after one more entry; None where the entry says nothing of chosen responses.

        Args:
            entry: What was logged, with its ``step``, as ``trainer_state.json`` has it.
        """
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
        """The change after each entry that says something."""
        return [change for entry in history if (change := self.add(entry)) is not None]


def displacement_facts(history: Sequence[Mapping[str, Any]], margin: float | None) -> dict[str, Any]:
    """What a manifest says of a finished training: ``{"displacement": {...}}``, or nothing where nothing was logged.

    ``last`` and ``lowest`` are changes in nats per token; ``warned_at`` is the update at which the alarm went off,
    None where it did not.
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
    """Warns once, in words, when the chosen responses have become less likely by more than a margin.

    It reads what a step logs, so it costs no pass of the model and nothing on steps that log nothing. A checkpoint
    holds what was logged before it, so a training that goes on does not warn again.

    Args:
        margin: Nats per token; None never warns.
        where: The table of the training in the recipe, such as ``policy.training``, for the message.
        warn: Called with the message.
    """

    def __init__(self, margin: float | None, where: str, warn: Callable[[str], None]) -> None:
        self._margin, self._where, self._warn = margin, where, warn
        self._changes, self._warned = Changes(), False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up what was logged before a checkpoint."""
        self._changes = Changes()
        before = self._changes.of(state.log_history)
        self._warned = any(_displaced(change, self._margin) for change in before)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at what was logged last."""
        change = self._changes.add(state.log_history[-1])
        if self._margin is None or self._warned or change is None or not _displaced(change, self._margin):
            return
        self._warned = True
        if state.is_world_process_zero:
            self._warn(_message(change, self._margin, self._where))


def _message(change: Change, margin: float, where: str) -> str:
    return (
        f"  warning, displacement: at update {change.step} the chosen responses are {-change.value:.2f} nats a token less likely "
        f"than at the start (over the tokens that have weight; the alarm is at {margin:g}). The model moves probability away "
        "from the replies that people preferred, to others that nobody compared, while accuracies and margins still rise; "
        f"look at its replies before you trust it. What helps: a lower {where}.learning_rate or fewer updates, an sft table "
        "before it, a smaller share of rejected tokens; with dpo, a larger beta. "
        f"{where}.displacement_margin sets the alarm, null turns it off."
    )


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
