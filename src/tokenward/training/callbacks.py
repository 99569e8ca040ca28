"""Progress on screen, checkpoints by the clock, and an orderly stop on Ctrl-C."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokenward.display import Bar
from tokenward.training.speed import speed_note

STOPPING = "\nstopping after this step; Ctrl-C again stops now\n"
SHOWN = ("loss", "nll", "rewards/accuracies", "rewards/margins")


class ShowProgress(TrainerCallback):
    """Advances a bar by optimizer steps and shows the last logged values."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._note = ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start where the checkpoint ended."""
        self._bar.begin(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep the values for the next step's line."""
        values = {
            name.split("/")[-1]: value for name in SHOWN if (value := (logs or {}).get(name)) is not None
        }
        if values:
            shown = [f"{name} {value:.3f}" for name, value in values.items()]
            speed = speed_note(state.log_history[-1]) if state.log_history else ""
            parts = filter(
                None, [*shown[:1], speed, *shown[1:]]
            )  # a narrow screen has room for the first ones
            self._note = f"at step {state.global_step}: {'  '.join(parts)}"

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One optimizer step is done."""
        self._bar.advance(1, self._note)


class CheckpointEvery(TrainerCallback):
    """Saves a checkpoint when so many minutes have passed since the last one."""

    def __init__(self, minutes: float) -> None:
        self._seconds = minutes * 60
        self._last = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a checkpoint if it is time."""
        if time.monotonic() - self._last >= self._seconds:
            control.should_save = True
            self._last = time.monotonic()


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C ends the current step, saves a checkpoint and stops; the second stops at once.

    Attributes:
        interrupted: Whether the run was stopped so.
    """

    def __init__(self) -> None:
        self.interrupted = False

    @contextmanager
    def listening(self) -> Iterator["StopOnInterrupt"]:
        """Handle Ctrl-C while open, where this is the main thread of a process that has signals."""
        try:
            before = signal.signal(signal.SIGINT, self._note)
        except ValueError:  # not in the main thread: the caller's own handling stays
            yield self
            return
        try:
            yield self
        finally:
            signal.signal(signal.SIGINT, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        # A step with fresh samples takes minutes. A handler may come in the middle of a print, so not print itself.
        os.write(2, STOPPING.encode())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop after an interrupt."""
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True
