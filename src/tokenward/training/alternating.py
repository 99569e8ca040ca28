"""The alternating loop: learn a token reward, improve the policy with it, learn it again on fresh samples.

TLM (arXiv 2306.00398), section 3: the reward is learned before the first policy update and again every M updates, on
samples of the current policy, until a given share of the training. The policy itself is trained by transformers'
Trainer; this callback runs between its steps, so checkpoints and resume are those of every other stage.
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
from transformers import TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Args

from tokenward.artifacts import atomic_write, read_json
from tokenward.errors import UserError
from tokenward.models.sharding import put, reshard
from tokenward.training.callbacks import KeepBest, trained_weights, whole_trained, write_weights
from tokenward.training.checks import after, check_weights, diverging

REWARD_FILE, BEST_FILE, STATE_FILE = "reward.safetensors", "best.safetensors", "alternating.json"

Learn = Callable[[int, int], dict[str, Any]]
"""``f(phase, step) -> facts``: learns the reward on samples of the current policy."""

Evaluate = Callable[[int], dict[str, float]]
"""``f(step) -> figures`` of the current policy, with ``score`` among them; higher is better."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """When the reward is learned and when the policy is evaluated.

    Attributes:
        every: Policy updates between two times the reward is learned; None learns it once.
        until: Share of the policy's updates after which the reward is not learned again.
        evaluate_every: Policy updates between two evaluations; None never evaluates.
    """

    _: KW_ONLY
    every: int | None = None
    until: float = 0.5
    evaluate_every: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.until <= 1:
            raise UserError(
                f"until must be between 0 and 1, got {self.until}. Use 0.5 to stop half-way.",
                code="invalid-setting",
                key="online.until",
            )

    def learns_at(self, step: int, total: int) -> bool:
        """Whether the reward is learned after this many policy updates; always before the first."""
        if step == 0:
            return True
        # A product such as 0.29 * 100 is slightly below the integer that is meant.
        last = int(self.until * total + 1e-9)
        return self.every is not None and step % self.every == 0 and step <= last and step < total

    def evaluates_at(self, step: int, total: int) -> bool:
        """Whether the policy is evaluated after this many updates."""
        every = self.evaluate_every
        return every is not None and (step % every == 0 or step == total)


class Alternating(TrainerCallback):
    """Learns the reward and evaluates the policy between the policy's updates.

    ``learn`` and ``reward`` (its module, saved in every checkpoint) are None if the objective needs no reward, ``evaluate``
    is None to skip evaluations. ``best`` keeps the policy's best weights, ``show`` is called with one line per event.

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

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        if state.global_step:
            self._resume(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
        else:
            self.on_step_end(args, state, control, **kwargs)

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        step, total = state.global_step, state.max_steps
        evaluate = self._evaluate if self._schedule.evaluates_at(step, total) else None
        learn = self._learn if self._schedule.learns_at(step, total) else None
        if (evaluate or learn) and kwargs.get("model") is not None:
            check_weights(kwargs["model"], step, args.learning_rate)
        if evaluate is not None:
            with diverging(after(step, args.learning_rate)):
                self._evaluate_policy(evaluate, step, control)
        stopping = control.should_training_stop
        if learn is not None and not stopping:
            phase = sum(event["event"] == "reward" for event in self.events)
            when = f"while the reward is learned {after(step, args.learning_rate)}"
            with separate_training(), diverging(when):
                facts = learn(phase, step)
            self._note({"event": "reward", "step": step, "phase": phase, **facts})

    def _evaluate_policy(self, evaluate: Evaluate, step: int, control: Control) -> None:
        figures = evaluate(step)
        best = self._best.update(figures["score"], step)
        self._note({"event": "policy", "step": step, **figures, "best": best})
        if self._best.exhausted:
            control.should_training_stop = True
            reason = f"no gain in {self._best.waited} evaluations"
            self._note({"event": "stop", "step": step, "reason": reason})

    def _note(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        shown = "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in event.items()
            if key != "event" and not isinstance(value, dict)
        )
        self._show(f"  {event['event']}: {shown}")

    def on_save(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        reward = {} if self._reward is None else whole_trained(self._reward)  # all processes must take part
        if not state.is_world_process_zero:
            return
        if self._reward is not None:
            write_weights(reward, folder / REWARD_FILE)
        if self._best.value is not None:
            self._best.save(folder / BEST_FILE)
        record = {"events": self.events, "best": self._best.state()}
        # Written last: a checkpoint is complete only with it.
        atomic_write(folder / STATE_FILE, json.dumps(record) + "\n")

    @property
    def best_step(self) -> int | None:
        """Number of updates of the best policy; None if it was never evaluated."""
        return self._best.step if self._best.value is not None else None

    def finish(self) -> None:
        """Put the best policy back, if it was evaluated."""
        self._best.restore()

    def _resume(self, folder: Path) -> None:
        record = read_json(folder / STATE_FILE)
        self.events = record["events"]
        if self._reward is not None:
            weights = load_file(folder / REWARD_FILE)
            reshard(self._reward)
            for name, parameter in trained_weights(self._reward):
                put(parameter, weights[name])
        if record["best"]["value"] is not None:
            self._best.load(folder / BEST_FILE, record["best"])


def stopped_early(checkpoint: Path) -> bool:
    """Whether an alternating training had run out of patience at a checkpoint; False for any other training."""
    path = checkpoint / STATE_FILE
    events = read_json(path)["events"] if path.is_file() else []
    return bool(events) and events[-1]["event"] == "stop"


@contextmanager
def separate_training() -> Iterator[None]:
    """A context in which another Trainer may run between two steps of a Trainer without affecting it.

    transformers seeds every random generator when it makes a Trainer, and accelerate keeps one list of active data
    loaders per process, in which a loader that stopped early would stay as the current one.
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
