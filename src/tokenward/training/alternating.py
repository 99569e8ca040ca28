"""The alternating loop: learn a token reward, improve the policy with it, learn it again on fresh samples.

TLM (arXiv 2306.00398), section 3: the reward is learned before the first policy update, and again every M updates
on samples of the policy as it is then, until a stated part of training. The policy's own training is transformers'
Trainer; this callback does what lies between its steps, so checkpoints and resume are those of every other stage.
"""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import GradientState
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokenward.artifacts import atomic_write, read_json
from tokenward.errors import UserError
from tokenward.training.callbacks import KeepBest, save_trained, trained

REWARD_FILE, BEST_FILE, STATE_FILE = "reward.safetensors", "best.safetensors", "alternating.json"

Learn = Callable[[int, int], dict[str, Any]]
"""``f(phase, step) -> facts``: learns the reward on samples of the policy of now."""

Evaluate = Callable[[int], dict[str, float]]
"""``f(step) -> figures`` of the policy of now; ``score`` among them, higher is better."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """When the reward is learned, and when the policy is looked at.

    Attributes:
        every: Policy updates between two times the reward is learned; None learns it once.
        until: Share of the policy's updates after which it is not learned again.
        evaluate_every: Policy updates between two looks at the policy; None never looks.
    """

    _: KW_ONLY
    every: int | None = None
    until: float = 0.5
    evaluate_every: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.until <= 1:
            raise UserError(f"online.until must be in [0, 1], got {self.until}. Write 0.5 to stop half-way.")

    def learns_at(self, step: int, total: int) -> bool:
        """Whether the reward is learned after so many of the policy's updates; always before the first."""
        if step == 0:
            return True
        # A product such as 0.29 * 100 lies a little under the whole number that it means.
        last = int(self.until * total + 1e-9)
        return self.every is not None and step % self.every == 0 and step <= last and step < total

    def looks_at(self, step: int, total: int) -> bool:
        """Whether the policy is looked at after so many updates."""
        every = self.evaluate_every
        return every is not None and (step % every == 0 or step == total)


class Alternating(TrainerCallback):
    """Learns the reward and judges the policy between the policy's updates.

    Args:
        schedule: When.
        learn: Learns the reward; None where the objective needs none.
        reward: The reward's module, saved in every checkpoint; None as above.
        evaluate: Judges the policy; None where there is nothing to judge by.
        best: Keeps the policy's best weights.
        show: Called with one line per event.

    Attributes:
        events: What happened, in order: ``{"event": "reward" | "policy" | "stop", "step": ..., ...}``.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        learn: Learn | None,
        reward: nn.Module | None,
        evaluate: Evaluate | None,
        best: KeepBest,
        show: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._schedule, self._learn, self._reward = schedule, learn, reward
        self._evaluate, self._best, self._show = evaluate, best, show
        self.events: list[dict[str, Any]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Learn the reward before the first update, or take up a checkpoint's."""
        if state.global_step:
            self._resume(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
        else:
            self._between(state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After an update: learn the reward again, look at the policy, if it is time."""
        self._between(state, control)

    def _between(self, state: TrainerState, control: TrainerControl) -> None:
        step, total = state.global_step, state.max_steps
        if self._evaluate is not None and self._schedule.looks_at(step, total):
            self._look(self._evaluate, step, control)
        if (
            self._learn is not None
            and self._schedule.learns_at(step, total)
            and not control.should_training_stop
        ):
            phase = sum(event["event"] == "reward" for event in self.events)
            with separate_training():
                facts = self._learn(phase, step)
            self._note({"event": "reward", "step": step, "phase": phase, **facts})

    def _look(self, evaluate: Evaluate, step: int, control: TrainerControl) -> None:
        figures = evaluate(step)
        best = self._best.look(figures["score"], step)
        self._note({"event": "policy", "step": step, **figures, "best": best})
        if self._best.exhausted:
            control.should_training_stop = True
            self._note({"event": "stop", "step": step, "reason": f"no gain in {self._best.waited} looks"})

    def _note(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        shown = "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in event.items()
            if key != "event" and not isinstance(value, dict)
        )
        self._show(f"  {event['event']}: {shown}")

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the reward, the best policy and the events into the checkpoint."""
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if self._reward is not None:
            save_trained(self._reward, folder / REWARD_FILE)
        if self._best.value is not None:
            self._best.save(folder / BEST_FILE)
        record = {"events": self.events, "best": self._best.state()}
        atomic_write(folder / STATE_FILE, json.dumps(record) + "\n")

    @property
    def best_step(self) -> int | None:
        """Update after which the policy was at its best; None where it was never looked at."""
        return self._best.step if self._best.value is not None else None

    def finish(self) -> None:
        """Put the best policy back, where it was looked at."""
        self._best.restore()

    def _resume(self, folder: Path) -> None:
        record = read_json(folder / STATE_FILE)
        self.events = record["events"]
        if self._reward is not None:
            weights = load_file(folder / REWARD_FILE)
            with torch.no_grad():
                for name, parameter in trained(self._reward):
                    parameter.copy_(weights[name])
        if record["best"]["value"] is not None:
            self._best.load(folder / BEST_FILE, record["best"])


def stopped_early(checkpoint: Path) -> bool:
    """Whether the policy's training had ended at a checkpoint, its patience over; False for any other training."""
    path = checkpoint / STATE_FILE
    events = read_json(path)["events"] if path.is_file() else []
    return bool(events) and events[-1]["event"] == "stop"


@contextmanager
def separate_training() -> Iterator[None]:
    """Train something else between two steps of a Trainer, which then goes on as if nothing had happened.

    transformers seeds every generator when it makes a Trainer, and accelerate keeps one list of open data loaders
    for the whole process: a loader that stopped early would stay at its end.
    """
    gradients = GradientState()
    loaders, synchronises = gradients.dataloader_references, gradients.sync_gradients
    python, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            gradients.dataloader_references = loaders
            gradients._set_sync_gradients(synchronises)
            random.setstate(python)
            np.random.set_state(numpy_state)
