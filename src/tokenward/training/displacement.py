"""An alarm for displaced likelihood: training that makes the chosen responses less likely than they were.

A loss of the margin between two responses is content when both fall, the rejected one faster; the probability goes
to replies that nobody compared (arXiv 2402.13228, 2410.08847). Accuracies and margins look well meanwhile.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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
