"""Measurements on this machine: its speed and memory, and the time and memory of one real step."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokenward.models.base import TokenModel
from tokenward.models.loading import LanguageModel
from tokenward.objectives.base import Objective
from tokenward.sampling import SamplingSettings, sample_replies
from tokenward.scoring.reads import token_values
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.template import Style
from tokenward.training.arguments import training_arguments
from tokenward.training.trainer import TokenTrainer

SIDE = 1024
"""Rows and columns of the matrices whose product gives the machine's speed."""

SAMPLED_TOKENS = 8
"""Tokens per reply when the speed of sampling is measured."""

_STATUS = Path("/proc/self/status")


class Measured(NamedTuple):
    """Time of a step, and peak memory in bytes: of the process on a CPU, of torch on a GPU; None if it is unknown."""

    seconds: float
    peak: float | None


def machine_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a matrix product."""
    left, right = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))

    def four_products() -> float:
        start = time.perf_counter()
        for _ in range(4):
            torch.matmul(left, right)
        _synchronize(device)
        return time.perf_counter() - start

    four_products()
    return 4 * 2.0 * SIDE**3 / median(four_products() for _ in range(5))


def training_step(
    model: TokenModel,
    objective: Objective,
    rows: Sequence[TokenRow],
    table: dict[str, Any],
    *,
    where: str,
    device: str,
    reference: LanguageModel | None = None,
) -> Measured:
    """Measure an optimizer step on one batch. The model changes; nothing is kept on disk.

    Accumulation, evaluation and trackers of the recipe's ``training`` table are turned off.
    """
    alone = {
        "max_steps": 2,
        "gradient_accumulation_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "report_to": "none",
        "per_device_train_batch_size": len(rows),
    }
    with TemporaryDirectory() as folder, peak_memory(model.device) as peak:
        table = {**table, **alone}
        arguments = training_arguments(table, folder=Path(folder), seed=0, where=where, device=device)
        clock = _Clock(model.device)
        trainer = TokenTrainer(model, objective, arguments, rows, reference=reference, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return Measured(clock.seconds, peak())


def scoring_pass(model: TokenModel, rows: Sequence[TokenRow], precision: str) -> Measured:
    """Measure one pass without gradients."""
    tokens = sum(row.length for row in rows) * max(len(row.responses) for row in rows)
    token_values(model, rows[-1:], precision=precision, tokens_per_batch=tokens)  # warm-up
    with peak_memory(model.device) as peak:
        start = time.perf_counter()
        token_values(model, rows, precision=precision, tokens_per_batch=tokens)
        seconds = time.perf_counter() - start
    return Measured(seconds, peak())


def seconds_per_token(
    model: LanguageModel, style: Style, prompts: Sequence[Sequence[int]], settings: SamplingSettings
) -> float:
    """Seconds to add one token to every reply of a batch, including a share of the time to read the prompts."""
    short = replace(settings, max_new_tokens=SAMPLED_TOKENS, fixed_length=True)
    template = model.template(style)
    sample_replies(model, template, prompts[:1], short, seed=0)  # warm-up
    start = time.perf_counter()
    sample_replies(model, template, prompts, short, seed=0)
    return (time.perf_counter() - start) / SAMPLED_TOKENS


class _Clock(TrainerCallback):
    """Seconds of the last step. The first step is slower because it warms up."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._start, self.seconds = device, 0.0, 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _synchronize(self._device)
        self._start = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _synchronize(self._device)
        self.seconds = time.perf_counter() - self._start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], float | None]]:
    """Watch memory inside the block. Afterwards, the yielded function returns the peak in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: float(torch.cuda.max_memory_allocated(device))
        return
    if not _STATUS.is_file():
        yield lambda: None
        return
    # torch counts no memory on a CPU, so a thread samples what the process holds.
    peak, stop = [_process_memory()], threading.Event()

    def sample() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], _process_memory())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield lambda: peak[0]
    finally:
        stop.set()
        thread.join()


def _process_memory() -> float:
    """Anonymous memory of this process in bytes. Mapped files are left out: the system can drop them at any time."""
    return _read_kilobytes(_STATUS, "RssAnon")


def _read_kilobytes(file: Path, name: str) -> float:
    """The bytes of a line ``name: 12 kB`` in a file of ``/proc``."""
    lines = file.read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def free_memory(device: torch.device) -> float | None:
    """Bytes that this process can use, including what it already uses; None if the system does not report it."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    if not _STATUS.is_file():
        return None
    return _read_kilobytes(Path("/proc/meminfo"), "MemAvailable") + _process_memory()
