"""How much each stage of a recipe has to do, and what one real step takes on this machine."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from tokenward.models.base import TokenModel
from tokenward.models.loading import LanguageModel
from tokenward.objectives.base import Objective
from tokenward.ops.costs import Work
from tokenward.sampling import SamplingSettings, sample_replies
from tokenward.scoring.reads import token_values
from tokenward.stages.auxiliary import made_scorer, trained_auxiliary
from tokenward.stages.base import Rows
from tokenward.stages.run import AUXILIARY, Run
from tokenward.stages.scores import scoring_models
from tokenward.stages.subset import looked_at
from tokenward.stages.tables import tables
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Style, Template
from tokenward.training.arguments import TokenTrainingArguments, training_arguments
from tokenward.training.trainer import TokenTrainer


class SubsetPass(NamedTuple):
    """The pass over the data for an auxiliary model's subset.

    Attributes:
        stage: The auxiliary model's.
        rows: Every prompt with the responses that are looked at.
        models: Those that pass.
    """

    stage: str
    rows: TokenTable
    models: list[str]


def subset_passes(run: Run, template: Template) -> list[SubsetPass]:
    """The passes for the subset of the auxiliary models that are trained, in their order."""
    found: list[SubsetPass] = []
    for name in trained_auxiliary(run):
        subset = run.recipe.auxiliary_models[name].subset
        if subset is not None:
            rows = looked_at(tables(run, template).part("train"), subset).by_prompt()
            found.append(SubsetPass(f"{AUXILIARY}{name}", rows, scoring_models(made_scorer(subset.scorer))))
    return found


def row_work(rows: Rows, *, shared: bool) -> np.ndarray:
    """Work of each row, a column for each field of ``Work``.  -> [rows 3]"""
    if not len(rows):
        return np.zeros((0, 3))
    if isinstance(rows, TokenTable):
        first, counts, lengths = rows.starts[:-1], rows.sizes, rows.lengths
        prompts = rows.of_rows("prompt_kept").astype(float)
    else:
        counts = np.array([len(row.responses) for row in rows])
        first = np.cumsum(counts) - counts
        lengths = np.array([len(ids) for row in rows for ids in row.responses], np.int64)
        prompts = np.array([len(row.prompt) for row in rows], float)
    replies = np.add.reduceat(lengths, first).astype(float)
    squares = np.add.reduceat(lengths.astype(float) ** 2, first)
    copies = np.ones(len(first)) if shared else counts
    tokens = copies * prompts + replies
    seen = copies * prompts**2 / 2 + replies * prompts + squares / 2
    return np.stack([tokens, replies, seen], axis=1)


def summed(work: np.ndarray) -> Work:
    """Work of several rows together."""
    return Work(*work.sum(axis=0).tolist())


class Steps(NamedTuple):
    """The course of a training.

    Attributes:
        updates: Optimizer steps.
        batch: Comparisons in each.
        micro: Comparisons that go through the model before gradients are added up.
        looks: Evaluations during training.
        arguments: All of them.
    """

    updates: int
    batch: int
    micro: int
    looks: int
    arguments: TokenTrainingArguments


def steps_of(run: Run, table: dict[str, Any], stage: str, rows: int) -> Steps:
    """The course of a training on so many rows, in one process."""
    with TemporaryDirectory() as folder:
        arguments = training_arguments(
            table, folder=Path(folder), seed=0, where=f"{stage}.training", device=run.recipe.model.device
        )
    micro = arguments.per_device_train_batch_size
    batch = micro * arguments.gradient_accumulation_steps
    an_epoch = math.ceil(rows / batch)
    count = (
        arguments.max_steps if arguments.max_steps > 0 else math.ceil(an_epoch * arguments.num_train_epochs)
    )
    strategy = IntervalStrategy(arguments.eval_strategy)
    every = an_epoch if strategy == IntervalStrategy.EPOCH else int(arguments.eval_steps or 0)
    looks = 0 if strategy == IntervalStrategy.NO or not every else count // every
    return Steps(count, min(batch, rows), min(micro, rows), looks, arguments)


def chosen_rows(rows: Rows, numbers: np.ndarray) -> list[TokenRow]:
    """The rows of these numbers, with random scores since those of the run may not exist yet."""
    generator = torch.Generator().manual_seed(0)
    found = [rows[number] for number in numbers.tolist()]
    flat = torch.randn(sum(len(ids) for row in found for ids in row.responses), generator=generator)
    parts = iter(flat.split([len(ids) for row in found for ids in row.responses]))
    return [replace(row, scores=[next(parts) for _ in row.responses]) for row in found]


SIDE = 1024
"""Rows and columns of the product that gives the machine's rate."""

SAMPLED_TOKENS = 8
"""Tokens of a reply that is drawn to be timed."""

_STATUS = Path("/proc/self/status")


class Measured(NamedTuple):
    """One step on the longest rows.

    Attributes:
        seconds: Of the second step; the first one warms up.
        peak: Most bytes this process held, Python and libraries included; of a GPU, what torch held there. None
            where the system does not tell.
    """

    seconds: float
    peak: float | None


def machine_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second in a matrix product."""
    left, right = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))

    def once() -> float:
        begun = time.perf_counter()
        for _ in range(4):
            torch.matmul(left, right)
        _wait(device)
        return time.perf_counter() - begun

    once()
    return 4 * 2.0 * SIDE**3 / median(once() for _ in range(5))


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
    """Two optimizer steps over the same rows, in a folder that is deleted; the model is changed by them.

    Args:
        model: What is trained.
        objective: What it is trained with.
        rows: One batch of one device, with everything that the objective needs.
        table: The recipe's ``training`` table; accumulation, evaluation and trackers are left out.
        where: The table's name, for messages.
        device: The recipe's ``model.device``.
        reference: The frozen model beside it, where the objective needs one.
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
        arguments = training_arguments(
            {**table, **alone}, folder=Path(folder), seed=0, where=where, device=device
        )
        clock = _Clock(model.device)
        trainer = TokenTrainer(model, objective, arguments, rows, reference=reference, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return Measured(clock.seconds, peak())


def scoring_pass(model: TokenModel, rows: Sequence[TokenRow], precision: str) -> Measured:
    """One pass without gradients."""
    tokens = sum(row.length for row in rows) * max(len(row.responses) for row in rows)
    token_values(model, rows[-1:], precision=precision, tokens_per_batch=tokens)  # the first call warms up
    with peak_memory(model.device) as peak:
        begun = time.perf_counter()
        token_values(model, rows, precision=precision, tokens_per_batch=tokens)
        seconds = time.perf_counter() - begun
    return Measured(seconds, peak())


def seconds_per_token(
    model: LanguageModel, style: Style, prompts: Sequence[Sequence[int]], settings: SamplingSettings
) -> float:
    """Seconds in which every reply of a batch gets one token more; its share of reading the prompts is in it."""
    short = settings._replace(max_new_tokens=SAMPLED_TOKENS, fixed_length=True)
    template = model.template(style)
    sample_replies(model, template, prompts[:1], short, seed=0)  # as above
    begun = time.perf_counter()
    sample_replies(model, template, prompts, short, seed=0)
    return (time.perf_counter() - begun) / SAMPLED_TOKENS


class _Clock(TrainerCallback):
    """Seconds of the last step."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._begun, self.seconds = device, 0.0, 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _wait(self._device)
        self._begun = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _wait(self._device)
        self.seconds = time.perf_counter() - self._begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], float | None]]:
    """Watch memory while open; then the function gives the most bytes that were held."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: float(torch.cuda.max_memory_allocated(device))
        return
    if not _STATUS.is_file():
        yield lambda: None
        return
    found, stop = [_held()], threading.Event()

    def sample() -> None:
        while not stop.wait(0.02):
            found.append(max(found.pop(), _held()))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield lambda: found[0]
    finally:
        stop.set()
        thread.join()


def _held() -> float:
    """Anonymous memory of this process: mapped files, which the system drops at will, are not in it."""
    return _kilobytes(_STATUS, "RssAnon")


def _kilobytes(file: Path, name: str) -> float:
    """A line ``name: 12 kB`` of a file of the system, in bytes."""
    lines = file.read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def free_memory(device: torch.device) -> float | None:
    """Bytes that this process may hold, what it holds already included, or None where the system does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    if not _STATUS.is_file():
        return None
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable") + _held()
