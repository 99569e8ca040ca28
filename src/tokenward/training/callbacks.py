"""Trainer callbacks: best weights, speed, sample replies, progress, checkpoints by the clock, stopping on Ctrl-C."""

import math
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Args

from tokenward.artifacts import read_jsonl, write_jsonl
from tokenward.display import Bar
from tokenward.distributed import alone, any_of, gather, is_first
from tokenward.errors import StoppedBySignal
from tokenward.models.sharding import is_first_process, put, reshard, whole
from tokenward.sampling import Reply
from tokenward.training.checks import diverging

RELATIVE_GAIN = 1e-4
"""Minimum improvement that counts, as a share of the best value (the value in TLM's published code)."""


def trained_weights(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The weights that training changes; ``named_parameters`` gives tied ones once, as safetensors needs it."""
    return [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]


def save_trained(module: nn.Module, path: Path) -> None:
    """Write the weights that training changes, in the first process. All processes must call this."""
    write_weights(whole_trained(module), path)


def whole_trained(module: nn.Module) -> dict[str, Tensor | None]:
    """Whole copies of the weights that training changes, see :func:`tokenward.models.sharding.whole`."""
    return {name: whole(weight) for name, weight in trained_weights(module)}


def write_weights(weights: Mapping[str, Tensor | None], path: Path) -> None:
    """Write whole weights, in the first process."""
    if is_first_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in weights.items() if value is not None}, path)


class KeepBest:
    """Keeps a module's trained weights at the best value of a metric.

    If the processes of a training hold parts of the weights, all must call the same methods; the first one keeps the whole weights.
    After ``patience`` evaluations in a row without improvement it is :attr:`exhausted`; with None it never is.
    """

    def __init__(self, module: nn.Module, *, larger_is_better: bool, patience: int | None) -> None:
        self._module, self._sign, self._patience = module, 1.0 if larger_is_better else -1.0, patience
        self._weights: dict[str, Tensor | None] = {}
        self.value: float | None = None
        self.step = 0
        self.waited = 0

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self._patience is not None and self.waited >= self._patience

    def update(self, value: float, step: int) -> bool:
        """Whether this is the best value so far; if so, the current weights are kept."""
        if not self._improves(value):
            self.waited += 1
            return False
        self.value, self.step, self.waited = value, step, 0
        self._weights = whole_trained(self._module)
        return True

    def _improves(self, value: float) -> bool:
        if self.value is None or not math.isfinite(value):
            return math.isfinite(value)
        return self._sign * (value - self.value) > RELATIVE_GAIN * abs(self.value)

    def restore(self) -> None:
        """Put the best weights back, if there are any."""
        reshard(self._module)
        for name, weight in trained_weights(self._module):
            if name in self._weights:
                put(weight, self._weights[name])

    def state(self) -> dict[str, Any]:
        """What :meth:`load` needs besides the weights."""
        return {"value": self.value, "step": self.step, "waited": self.waited}

    def save(self, path: Path) -> None:
        """Write the kept weights, in the first process."""
        write_weights(self._weights, path)

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Continue from what :meth:`save` and :meth:`state` gave."""
        self._weights = dict(load_file(path))
        self.value, self.step, self.waited = state["value"], state["step"], state["waited"]


class EarlyStop(TrainerCallback):
    """Keeps the weights with the best evaluation loss, and stops when patience runs out."""

    def __init__(self, best: KeepBest) -> None:
        self.best = best

    def on_evaluate(
        self, args: Args, state: State, control: Control, metrics: Any = None, **kwargs: Any
    ) -> None:
        self.best.update((metrics or {})["eval_loss"], state.global_step)
        if self.best.exhausted:
            control.should_training_stop = True


_STATUS = Path("/proc/self/status")


class Speed(TrainerCallback):
    """Adds throughput since the last log and peak memory to each logged training step.

    The clock runs only from the beginning of a step to the end of its update, so evaluation, checkpoints and other
    callbacks are not counted. The trainer counts the comparisons and tokens in ``seen``.
    """

    def __init__(self, seen: Counter[str]) -> None:
        self._seen, self._before = seen, Counter(seen)
        self._started, self._seconds, self._total = 0.0, 0.0, 0.0

    def on_step_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        self._started = time.monotonic()

    def on_optimizer_step(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        step = state.global_step + 1
        # Wait for the GPU only at steps that log, where the log waits anyway: other steps then cost nothing.
        if torch.cuda.is_available() and (step == 1 or step % max(state.logging_steps, 1) == 0):
            torch.cuda.synchronize()
        self._seconds += time.monotonic() - self._started

    def on_log(self, args: Args, state: State, control: Control, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in (logs or {}) or not self._seconds:
            return
        since = Counter(self._seen)
        since.subtract(self._before)
        state.log_history[-1] |= {**_rates(since, self._seconds), **memory()}
        self._total += self._seconds
        self._before, self._seconds = Counter(self._seen), 0.0

    def facts(self) -> dict[str, float]:
        """Mean throughput of the whole training and peak memory; empty if nothing was trained."""
        seconds = self._total + self._seconds
        return {**_rates(self._seen, seconds), **memory()} if seconds else {}


def _rates(seen: Mapping[str, int], seconds: float) -> dict[str, float]:
    return {f"{name}_per_second": float(f"{count / seconds:.4g}") for name, count in seen.items()}


def memory() -> dict[str, float]:
    """Peak memory in GB: of this process, if the system reports it, and of torch on a GPU."""
    found: dict[str, float] = {}
    if _STATUS.is_file():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        found["peak_memory_gb"] = int(line.split()[1]) * 1024 / 1e9
    if torch.cuda.is_available():
        found["peak_gpu_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return {name: round(value, 3) for name, value in found.items()}


def speed_note(entry: Mapping[str, Any]) -> str:
    """Speed and memory of a log entry in words; empty if it has none."""
    formats = {
        "tokens_per_second": "{:,.0f} tokens/s",
        "peak_memory_gb": "{:.1f} GB",
        "peak_gpu_memory_gb": "GPU {:.1f} GB",
    }
    return "  ".join(form.format(entry[name]) for name, form in formats.items() if name in entry)


SAMPLES = "samples.jsonl"


class AnswerPrompts(TrainerCallback):
    """Answers fixed prompts with the same random numbers before training, at each evaluation and at the end.

    One reply is shown. Each time adds one line per prompt to ``path``: ``{"step", "key", "prompt", "reply", "ended"}``. ``answer`` returns the
    current model's replies and must leave torch's generators as it found them, so that training is not affected. It is
    called in every process, or one would wait for the others, but only the ``main`` one writes and shows. ``also(step,
    total)`` says whether to answer after an update without an evaluation.
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

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        if not state.global_step:
            self.look(0)
        elif self._path.is_file():
            self._lines = [line for line in read_jsonl(self._path) if line["step"] <= state.global_step]

    def on_evaluate(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        self.look(state.global_step)

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        if self._also(state.global_step, state.max_steps):
            self.look(state.global_step)

    def look(self, step: int) -> None:
        """Answer the prompts after this many updates, unless that has been done."""
        if any(line["step"] == step for line in self._lines):
            return
        with diverging(f"after step {step}"):
            answers = self._answer()
        found = [
            {"step": step, "key": key, "prompt": prompt, "reply": reply.text, "ended": reply.ended}
            for key, prompt, reply in zip(self._keys, self._prompts, answers, strict=True)
        ]
        self._lines += found
        if not self._main:
            return
        write_jsonl(self._path, self._lines)
        if not step and len(found) > 1:
            self._show(
                f"  replies to {len(found)} prompts are kept in {self._path}; one is shown here, all in the report"
            )
        when = f"after {step} steps" if step else "before training"
        first = found[0]
        self._show(f"  reply {when}: {_one_line(first['prompt'], 40)} -> {_one_line(first['reply'], 120)}")


def _one_line(text: str, longest: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


SHOWN = ("loss", "nll", "rewards/accuracies", "rewards/margins")


class ShowProgress(TrainerCallback):
    """Advances a progress bar by optimizer steps and shows the latest logged values."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._note, self._waiting = "", 0

    def on_train_begin(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        self._bar.begin(state.global_step)

    def on_log(self, args: Args, state: State, control: Control, logs: Any = None, **kwargs: Any) -> None:
        logs = logs or {}
        shown = [f"{name.split('/')[-1]} {logs[name]:.3f}" for name in SHOWN if logs.get(name) is not None]
        if shown:
            speed = speed_note(state.log_history[-1]) if state.log_history else ""
            # Most important first: a narrow screen cuts the end.
            parts = filter(None, [*shown[:1], speed, *shown[1:]])
            self._note = f"at step {state.global_step}: {'  '.join(parts)}"
            self._advance()

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        self._waiting += 1
        if state.global_step < state.max_steps:  # the last step's values are logged after it, and end the bar
            self._advance()

    def on_train_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        self._advance()

    def _advance(self) -> None:
        self._bar.advance(self._waiting, self._note)
        self._waiting = 0


LOG_SECONDS, LOG_SHARE = 5.0, 0.005


class CheckpointEvery(TrainerCallback):
    """Saves a checkpoint when this many minutes have passed since the last one, by the clock of any process."""

    def __init__(self, minutes: float) -> None:
        self._seconds = minutes * 60
        self._last = time.monotonic()

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        if any_of(time.monotonic() - self._last >= self._seconds):
            control.should_save = True
            self._last = time.monotonic()


class LogSoFar(TrainerCallback):
    """Writes the log while the training goes on, at most every few seconds and in a small share of the time."""

    def __init__(self, path: Path) -> None:
        self._path, self._written, self._next = path, 0, 0.0

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        entries, begun = state.log_history, time.monotonic()
        if not state.is_world_process_zero or len(entries) == self._written or begun < self._next:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(self._path, entries, ascii=True)
        ended = time.monotonic()
        self._written, self._next = len(entries), ended + max(LOG_SECONDS, (ended - begun) / LOG_SHARE)


PRESSED_AGAIN = 2.0
"""Seconds after which another Ctrl-C is one of the user's, if there are several processes."""


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C or SIGTERM finishes the current step, saves a checkpoint and stops; the second stops at once.

    Of several processes, all stop after the same step.

    Attributes:
        signal: Number of the first signal; None if none has come.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = 0.0

    @contextmanager
    def listening(self) -> Iterator["StopOnInterrupt"]:
        """Handle the signals inside the context, if this is the main thread."""
        if current_thread() is not main_thread():  # signals stay with the caller
            yield self
            return
        before = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            # The terminal interrupts the processes, and torchrun does it once more.
            if alone() or time.monotonic() - self._since > PRESSED_AGAIN:
                raise StoppedBySignal(signal=number)
            return
        self.signal, self._since = number, time.monotonic()
        if not is_first():
            return
        # Say so now: a step with fresh samples can take minutes. print() is not reentrant, and a signal may arrive
        # inside one, so write to the file descriptor.
        again = "press Ctrl-C again" if number == signal.SIGINT else "send SIGTERM again"
        os.write(2, f"\nstopping after this step; {again} to stop now\n".encode())

    def on_step_end(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        self.signal = next((found for found in gather(self.signal) if found is not None), None)
        if self.signal is not None:
            control.should_save = True
            control.should_training_stop = True
