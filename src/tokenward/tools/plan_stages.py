"""The memory, time and disk space of each stage: estimated from sizes, and measured by one real step."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.trainer_utils import IntervalStrategy

from tokenward.api.training import frozen_beside, with_new_adapter
from tokenward.artifacts import fingerprint
from tokenward.models.identity import base_config, has_encoder, model_sizes
from tokenward.models.loading import DTYPES, OWN, device_of
from tokenward.objectives import needs_of
from tokenward.ops import costs
from tokenward.ops.costs import FLOAT, HALF, ModelSizes, NumberTypes, Work
from tokenward.sampling import SamplingSettings
from tokenward.scoring.reads import token_values
from tokenward.selection.weights import weigh_rows
from tokenward.stages.base import Rows, Training
from tokenward.stages.run import Run
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.table import TokenTable
from tokenward.tools.plan_devices import DevicePlan, ScoringWork, TrainingWork, Wanted, device_plans
from tokenward.tools.plan_measure import (
    Measured,
    machine_rate,
    scoring_pass,
    seconds_per_token,
    training_step,
)
from tokenward.training.arguments import TokenTrainingArguments, training_arguments

MEASURED_TOKENS = 2048
"""Tokens of the measured pass without gradients. The rest of the memory of a larger pass is estimated."""

EXAMPLE_ADAPTER: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


class StagePlan(NamedTuple):
    """What a stage will need. Values that cannot be predicted are None.

    Attributes:
        stage: Its name.
        work: What it does, in words.
        memory: Bytes, estimated.
        peak: Bytes, measured in a real step on the longest rows, including Python and the libraries.
        seconds: Time, estimated from the machine's speed.
        measured: Time, from a real step.
        disk: Bytes that it writes.
        note: What these numbers do not include.
    """

    stage: str
    work: str = ""
    memory: float | None = None
    peak: float | None = None
    seconds: float | None = None
    measured: float | None = None
    disk: float | None = None
    note: str = ""

    def with_time(self, seconds: np.ndarray) -> "StagePlan":
        """The plan with estimated and measured seconds; a measured time of NaN is None.  [2]"""
        measured = None if np.isnan(seconds[1]) else float(seconds[1])
        return self._replace(seconds=float(seconds[0]), measured=measured)


class Planner:
    """Plans the stages of one run. Times are arrays of estimated and measured seconds; not measured is NaN.

    With ``measure``, a pass without gradients is measured on ``rows``, and the speed of sampling on ``prompts``.
    """

    def __init__(self, run: Run, rows: Rows, prompts: Sequence[Sequence[int]], *, measure: bool) -> None:
        self.run, self.measure = run, measure
        self._rows, self._prompts = rows, prompts
        table = run.recipe.model
        encoder = has_encoder(table.name, trust_remote_code=table.trust_remote_code)
        self._shared_prompts = table.packing != "none" and not encoder
        own = base_config(table.name, trust_remote_code=table.trust_remote_code).dtype
        half = own == torch.bfloat16 if table.dtype == OWN else table.dtype == "bfloat16"
        self._bytes = HALF if half else FLOAT
        self._rates: dict[str, float] = {}
        self._steps: dict[str, Measured] = {}
        self.trainings: dict[str, TrainingWork] = {}
        self.scorings: dict[str, ScoringWork] = {}

    def rate(self, dtype: str) -> float:
        """Operations per second of this machine, measured once per number type."""
        if dtype not in self._rates:
            self._rates[dtype] = machine_rate(device_of(self.run.recipe.model.device), DTYPES[dtype])
        return self._rates[dtype]

    def sizes(self, name: str, adapter: dict[str, Any] | None = None) -> ModelSizes:
        """Sizes of a model."""
        return model_sizes(name, adapter=adapter, trust_remote_code=self.run.recipe.model.trust_remote_code)

    def work(self, rows: Rows) -> np.ndarray:
        """Work of each row, one column per field of ``Work``.  -> [rows 3]"""
        return row_work(rows, shared_prompts=self._shared_prompts)

    def training(self, item: Training) -> tuple[StagePlan, list[tuple[str, float]]]:
        """A training stage, and the settings that would lower its memory, each with the memory in bytes."""
        sizes, types = self.sizes(item.model, item.adapter), self._types(item.table)
        arguments = self.arguments(item.key, item.table)
        updates, batch, evaluations = course(arguments, len(item.rows))
        work = self.work(item.rows)
        longest = np.argsort(-work[:, 0], kind="stable")[: arguments.per_device_train_batch_size]
        rows = _rows_with_random_scores(item.rows, longest)
        rows = rows if item.selector is None else weigh_rows(item.selector, rows)
        work[:, 1] *= _kept_share(rows)
        again, budget = bool(arguments.activation_checkpointing), arguments.tokens_per_forward

        def memory(*, sizes=sizes, types=types, tokens=budget, checkpointing=again) -> float:
            part = largest_pass(work[longest], tokens)
            return costs.training_memory(sizes, part, types, checkpointing=checkpointing).total

        changes = {
            f"{item.key}.training.activation_checkpointing=true": memory(checkpointing=True),
            f"{item.key}.training.tokens_per_forward={budget // 2}": memory(tokens=budget // 2),
            f"{item.key}.training.bf16=true": memory(types=types._replace(products=HALF)),
            "model.dtype=bfloat16": memory(types=NumberTypes(HALF, HALF)),
        }
        if item.adapter is None:
            text = "model.adapter={r: 16, lora_alpha: 32, target_modules: all-linear}"
            changes[text] = memory(sizes=self.sizes(item.model, EXAMPLE_ADAPTER))
        self.trainings[item.stage] = TrainingWork(
            key=item.key,
            table=item.table,
            sizes=sizes,
            lora=sizes if item.adapter is not None else self.sizes(item.model, EXAMPLE_ADAPTER),
            types=types,
            largest=partial(largest_pass, work[longest]),
            mean=Work(*work.mean(axis=0).tolist()),
            rows=len(item.rows),
            budget=budget,
            checkpointing=again,
            # With an adapter, the model without it is the reference.
            reference=needs_of(item.objective).frozen_reference and item.adapter is None,
        )
        operations = partial(costs.training_operations, sizes, checkpointing=again)
        total = updates * operations(Work(*work.mean(axis=0).tolist()).times(batch))
        step = self._step(item, rows, operations(summed(work[longest]))) if self.measure else None
        rate = self.rate("bfloat16" if types.products == HALF else "float32")
        time = np.array([total / rate, np.nan if step is None else step.seconds * total])
        plan = StagePlan(
            item.stage,
            f"{updates} steps of {batch}",
            memory(),
            None if step is None else step.peak,
            disk=self._model_bytes(item, sizes),
        ).with_time(time + self._evaluations(item, evaluations))
        return plan, [(name, held) for name, held in changes.items() if held < memory()]

    def arguments(self, key: str, table: dict[str, Any]) -> TokenTrainingArguments:
        """The arguments of a ``training`` table."""
        where, device = f"{key}.training", self.run.recipe.model.device
        with TemporaryDirectory() as folder:
            return training_arguments(table, folder=Path(folder), seed=0, where=where, device=device)

    def _types(self, table: dict[str, Any]) -> NumberTypes:
        half = bool(table.get("bf16") or table.get("fp16")) or self._bytes == HALF
        return NumberTypes(self._bytes, HALF if half else FLOAT)

    def _model_bytes(self, item: Training, sizes: ModelSizes) -> float:
        model = self._bytes * (sizes.weights if item.adapter is None else sizes.trained)
        # A stage keeps its checkpoints only if the recipe asks for them.
        kept = item.table.get("save_total_limit", 1) if "save_strategy" in item.table else 0
        return model + kept * (model + 2 * self._bytes * sizes.trained)

    def _step(self, item: Training, rows: Sequence[TokenRow], operations: float) -> Measured:
        """Seconds per operation, and the peak, of a real step. The same training on other rows is measured once."""
        same = fingerprint([item.model, item.adapter, repr(item.objective), item.table])
        if same not in self._steps:
            found = self._real_step(item, rows)
            self._steps[same] = found._replace(seconds=found.seconds / operations)
        return self._steps[same]

    def _real_step(self, item: Training, rows: Sequence[TokenRow]) -> Measured:
        start = self.run.load(self.run.whole(item.model))
        model = with_new_adapter(start, item.adapter, self.run.recipe.seed)
        if needs_of(item.objective).reference:
            table = self.run.recipe.scores
            values = token_values(
                model, rows, precision=table.precision, tokens_per_batch=table.tokens_per_batch
            )
            rows = [replace(row, reference_logp=value) for row, value in zip(rows, values, strict=True)]
        return training_step(
            model,
            item.objective,
            rows,
            item.table,
            where=f"{item.key}.training",
            device=self.run.recipe.model.device,
            reference=frozen_beside(
                model,
                item.objective,
                lambda trained: self.run.load(trained.name),
                own=item.adapter is not None,
            ),
        )

    def _evaluations(self, item: Training, count: int) -> np.ndarray:
        """Time of the evaluations and of the replies to the fixed prompts during training."""
        time = self.forward(self.work(item.eval)) * count if count else np.zeros(2)
        if item.watched and self._prompts:
            time = time + self.replies((count + 2) * self.run.recipe.fixed_prompts / len(self._prompts))
        return time

    def forward(self, work: np.ndarray) -> np.ndarray:
        """Time of passes without gradients.  [rows 3] -> [2]"""
        sizes = self.sizes(self.run.recipe.model.name)
        operations = costs.forward_operations(sizes, summed(work)) if len(work) else 0.0
        estimated = operations / self.rate(self.run.recipe.scores.precision)
        if not self.measure:
            return np.array([estimated, np.nan])
        rows, found = self._pass
        return np.array(
            [estimated, found.seconds * operations / costs.forward_operations(sizes, summed(self.work(rows)))]
        )

    def on_devices(self, wanted: Wanted, order: Sequence[str]) -> list[DevicePlan]:
        """The stages planned so far, on several devices."""
        courses: dict[str, tuple[TokenTrainingArguments, int, int]] = {}
        for stage, work in self.trainings.items():
            arguments = self.arguments(work.key, work.table)
            courses[stage] = (arguments, *course(arguments, work.rows, processes=wanted.count)[:2])
        return device_plans(self.trainings, self.scorings, courses, wanted, order)

    def note_scoring(self, stage: str, work: np.ndarray, models: int) -> None:
        """Remember a scoring stage for a plan of several devices."""
        table = self.run.recipe.scores
        sizes = self.sizes(self.run.recipe.model.name)
        half = HALF if table.precision == "bfloat16" or self._bytes == HALF else FLOAT
        self.scorings[stage] = ScoringWork(
            sizes=sizes,
            types=NumberTypes(self._bytes, half),
            largest=largest_pass(self.work(self._rows), table.tokens_per_batch),
            operations=models * costs.forward_operations(sizes, summed(work)),
        )

    def forward_bytes(self) -> tuple[float, float | None]:
        """Memory of a pass without gradients, estimated and measured."""
        budget = self.run.recipe.scores.tokens_per_batch
        sizes, types = self.sizes(self.run.recipe.model.name), NumberTypes(self._bytes, self._bytes)
        estimated = costs.forward_memory(sizes, largest_pass(self.work(self._rows), budget), types).total
        if not self.measure:
            return estimated, None
        rows, found = self._pass
        small = costs.forward_memory(sizes, summed(self.work(rows)), types).total
        return estimated, None if found.peak is None else found.peak + max(estimated - small, 0.0)

    @cached_property
    def _pass(self) -> tuple[list[TokenRow], Measured]:
        work, table = self.work(self._rows)[:, 0], self.run.recipe.scores
        longest = np.argsort(-work, kind="stable")
        budget = min(table.tokens_per_batch, MEASURED_TOKENS)
        fitting = max(1, int((np.cumsum(work[longest]) <= budget).sum()))
        rows = _rows_with_random_scores(self._rows, longest[:fitting])
        return rows, scoring_pass(self.run.load(self.run.recipe.model.name), rows, table.precision)

    def replies(self, batches: float) -> np.ndarray:
        """Time of batches of replies that all have the longest length; most replies end earlier.  -> [2]"""
        table = self.run.recipe.evaluation
        sizes = self.sizes(self.run.recipe.model.name)
        operations = costs.generation_operations(sizes, batches * len(self._prompts), table.max_new_tokens)
        measured = batches * table.max_new_tokens * self._per_token if self.measure else np.nan
        return np.array([operations / self.rate(table.precision), measured])

    @cached_property
    def _per_token(self) -> float:
        table = self.run.recipe.evaluation
        settings = SamplingSettings(
            table.max_new_tokens, table.temperature, table.top_p, table.top_k, table.batch
        )
        model = self.run.load(self.run.recipe.model.name, dtype=table.precision)
        return seconds_per_token(model, self.run.style, self._prompts, settings)


def row_work(rows: Rows, *, shared_prompts: bool) -> np.ndarray:
    """Work of each row, one column per field of ``Work``.  -> [rows 3]"""
    if not len(rows):
        return np.zeros((0, 3))
    if isinstance(rows, TokenTable):
        counts, lengths, prompts = rows.sizes, rows.lengths, rows.of_rows("prompt_kept")
    else:
        counts = np.array([len(row.responses) for row in rows])
        lengths = np.array([len(ids) for row in rows for ids in row.responses])
        prompts = np.array([len(row.prompt) for row in rows])
    lengths, prompts, first = lengths.astype(float), prompts.astype(float), np.cumsum(counts) - counts
    replies, squares = np.add.reduceat(lengths, first), np.add.reduceat(lengths**2, first)
    copies = np.ones(len(first)) if shared_prompts else counts
    tokens = copies * prompts + replies
    seen = copies * prompts**2 / 2 + replies * prompts + squares / 2
    return np.stack([tokens, replies, seen], axis=1)


def summed(work: np.ndarray) -> Work:
    """The work of all rows together.  [rows, parts]"""
    return Work(*work.sum(axis=0).tolist())


def course(arguments: TokenTrainingArguments, rows: int, *, processes: int = 1) -> tuple[int, int, int]:
    """Optimizer steps, comparisons per step, and evaluations of a training."""
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * processes
    epoch = math.ceil(rows / batch)
    epochs = math.ceil(epoch * arguments.num_train_epochs)
    updates = arguments.max_steps if arguments.max_steps > 0 else epochs
    strategy = IntervalStrategy(arguments.eval_strategy)
    every = epoch if strategy == IntervalStrategy.EPOCH else int(arguments.eval_steps or 0)
    evaluations = 0 if strategy == IntervalStrategy.NO or not every else updates // every
    return updates, min(batch, rows), evaluations


def _rows_with_random_scores(rows: Rows, numbers: np.ndarray) -> list[TokenRow]:
    """Some rows with random scores, because the run's own scores may not exist yet."""
    generator = torch.Generator().manual_seed(0)
    found = [rows[number] for number in numbers.tolist()]
    lengths = [len(ids) for row in found for ids in row.responses]
    parts = iter(torch.randn(sum(lengths), generator=generator).split(lengths))
    return [replace(row, scores=[next(parts) for _ in row.responses]) for row in found]


def _kept_share(rows: Sequence[TokenRow]) -> float:
    """Share of response tokens that have weight."""
    lengths = [len(ids) for row in rows for ids in row.responses]
    weights = [int((part != 0).sum()) for row in rows for part in row.weights or ()]
    return sum(weights) / sum(lengths) if weights else 1.0


def largest_pass(work: np.ndarray, budget: int) -> Work:
    """The largest part of a batch that goes through the model at once; at least one row."""
    whole = work.sum(axis=0)
    tokens = max(min(whole[0], budget), work[:, 0].max())
    return Work(*(whole * tokens / whole[0]).tolist())
