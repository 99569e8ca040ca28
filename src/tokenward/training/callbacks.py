"""Trainer callbacks: progress, checkpoints by the clock, best weights, speed, sample replies, an orderly stop."""

import math
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokenward.artifacts import read_jsonl, write_jsonl
from tokenward.display import Bar
from tokenward.sampling import Reply

RELATIVE_GAIN = 1e-4
"""What counts as better, as a share of the best so far (the published code's value)."""


def trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The weights of a module that training changes, each once."""
    return [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]


def save_trained(module: nn.Module, path: Path) -> None:
    """Write the weights that training changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.detach().cpu().contiguous() for name, weight in trained(module)}, path)


class KeepBest:
    """Remembers a module's trained weights at the best value of a figure.

    Args:
        module: What is trained.
        larger_is_better: Which way the figure improves.
        patience: Looks in a row without a gain after which :attr:`exhausted` is true; None never is.
    """

    def __init__(self, module: nn.Module, *, larger_is_better: bool, patience: int | None) -> None:
        self._module, self._sign, self._patience = module, 1.0 if larger_is_better else -1.0, patience
        self._weights: dict[str, Tensor] = {}
        self.value: float | None = None
        self.step = 0
        self.waited = 0

    @property
    def exhausted(self) -> bool:
        """Whether patience is at its end."""
        return self._patience is not None and self.waited >= self._patience

    def look(self, value: float, step: int) -> bool:
        """Whether this is the best value so far; if so, the weights of now are kept."""
        if not self._gains(value):
            self.waited += 1
            return False
        self.value, self.step, self.waited = value, step, 0
        self._weights = {name: weight.detach().cpu().clone() for name, weight in trained(self._module)}
        return True

    def _gains(self, value: float) -> bool:
        """Whether a value is better than the best so far; one that is not finite never is."""
        if self.value is None or not math.isfinite(value):
            return math.isfinite(value)
        return self._sign * (value - self.value) > RELATIVE_GAIN * abs(self.value)

    def restore(self) -> None:
        """Put the best weights back; nothing if there was never a look."""
        for name, weight in trained(self._module):
            if name in self._weights:
                weight.data.copy_(self._weights[name])

    def state(self) -> dict[str, Any]:
        """What :meth:`load` needs beside the weights."""
        return {"value": self.value, "step": self.step, "waited": self.waited}

    def save(self, path: Path) -> None:
        """Write the kept weights."""
        save_file(self._weights, path)

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Go on from what :meth:`save` and :meth:`state` gave."""
        self._weights = load_file(path)
        self.value, self.step, self.waited = state["value"], state["step"], state["waited"]


class EarlyStop(TrainerCallback):
    """Keeps the best weights by the evaluation loss, and stops when patience is at its end."""

    def __init__(self, best: KeepBest) -> None:
        self.best = best

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at the loss of an evaluation."""
        self.best.look((metrics or {})["eval_loss"], state.global_step)
        if self.best.exhausted:
            control.should_training_stop = True


GIGABYTE = 1e9
_STATUS = Path("/proc/self/status")


class Speed(TrainerCallback):
    """Adds to each logged step what was read a second since the one before, and the memory that was held.

    The clock runs from the beginning of a step to the end of its update: evaluation, checkpoints and what a callback
    does between two steps are left out. What it adds stands in the trainer's history and decides nothing.

    Args:
        read: Comparisons and tokens that went through the model so far; the trainer counts them.
    """

    def __init__(self, read: Counter[str]) -> None:
        self._read, self._before = read, Counter(read)
        self._begun, self._seconds, self._total = 0.0, 0.0, 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The clock runs."""
        self._begun = time.monotonic()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The clock stops; what an accelerator still has to do is waited for where the step is logged, as the log does."""
        step = state.global_step + 1
        if torch.cuda.is_available() and (step == 1 or step % max(state.logging_steps, 1) == 0):
            torch.cuda.synchronize()
        self._seconds += time.monotonic() - self._begun

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the numbers of the interval into the history's last entry, where it is one of training steps."""
        if "loss" not in (logs or {}) or not self._seconds:
            return
        since = Counter(self._read)
        since.subtract(self._before)
        state.log_history[-1] |= {**_rates(since, self._seconds), **memory()}
        self._total += self._seconds
        self._before, self._seconds = Counter(self._read), 0.0

    def facts(self) -> dict[str, float]:
        """The mean over the whole training, and the most memory; empty where nothing was trained."""
        seconds = self._total + self._seconds
        return {**_rates(self._read, seconds), **memory()} if seconds else {}


def _rates(read: Mapping[str, int], seconds: float) -> dict[str, float]:
    return {f"{name}_per_second": float(f"{count / seconds:.4g}") for name, count in read.items()}


def memory() -> dict[str, float]:
    """The most that this process has held so far, in GB, where the system tells, and that torch has held on a GPU."""
    found: dict[str, float] = {}
    if _STATUS.is_file():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        found["peak_memory_gb"] = int(line.split()[1]) * 1024 / GIGABYTE
    if torch.cuda.is_available():
        found["peak_gpu_memory_gb"] = torch.cuda.max_memory_allocated() / GIGABYTE
    return {name: round(value, 3) for name, value in found.items()}


def speed_note(entry: Mapping[str, Any]) -> str:
    """What a logged entry says of speed and memory, for a line on screen; empty where it says nothing."""
    wanted = (
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("peak_memory_gb", "{:.1f} GB"),
        ("peak_gpu_memory_gb", "GPU {:.1f} GB"),
    )
    return "  ".join(form.format(entry[name]) for name, form in wanted if name in entry)


SAMPLES = "samples.jsonl"
PROMPT_SHOWN, REPLY_SHOWN = 40, 120
"""Characters of a prompt and of a reply in a line on screen."""


class AnswerPrompts(TrainerCallback):
    """Answers the same prompts with the same random numbers before training, at each evaluation and at the end.

    Each look adds a line a prompt to ``samples.jsonl``: ``{"step", "key", "prompt", "reply", "ended"}``. The
    training is not touched: ``answer`` must leave torch's generators as it found them.

    Args:
        keys: A stable name for each prompt.
        prompts: The text of each, to show and to store.
        answer: Replies of the model as it is now, one a prompt.
        path: The file.
        show: Called with each line for the screen.
        also: ``f(step, total)``: whether to look after an update that no evaluation follows.
        main: Whether this process writes and shows; every process must answer, or one would wait for the others.
    """

    def __init__(
        self,
        keys: Sequence[str],
        prompts: Sequence[str],
        answer: Callable[[], Sequence[Reply]],
        path: Path,
        *,
        show: Callable[[str], None],
        also: Callable[[int, int], bool] = lambda step, total: False,
        main: bool = True,
    ) -> None:
        self._keys, self._prompts, self._answer, self._path = keys, prompts, answer, path
        self._show, self._also, self._main = show, also, main
        self._lines: list[dict[str, Any]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look before the first update; after a stop, keep what was seen up to the checkpoint."""
        if not state.global_step:
            self.look(0)
        elif self._path.is_file():
            self._lines = [line for line in read_jsonl(self._path) if line["step"] <= state.global_step]

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look beside the figures."""
        self.look(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look where ``also`` says so."""
        if self._also(state.global_step, state.max_steps):
            self.look(state.global_step)

    def look(self, step: int) -> None:
        """Answer the prompts after so many updates, unless that was done."""
        if any(line["step"] == step for line in self._lines):
            return
        replies = self._answer()
        found = [
            {"step": step, "key": key, "prompt": prompt, "reply": reply.text, "ended": reply.ended}
            for key, prompt, reply in zip(self._keys, self._prompts, replies, strict=True)
        ]
        self._lines += found
        if not self._main:
            return
        write_jsonl(self._path, self._lines)
        self._show(f"  replies after {step} steps" if step else "  replies before training")
        for line in found:
            self._show(
                f"    {_one_line(line['prompt'], PROMPT_SHOWN)} -> {_one_line(line['reply'], REPLY_SHOWN)}"
            )


def _one_line(text: str, longest: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


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
