"""How fast a training goes and what memory it takes, measured beside it."""

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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
