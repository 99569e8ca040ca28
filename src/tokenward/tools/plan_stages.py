"""Each stage's memory, time and disk: by counting, and by one real step on the longest rows."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from tokenward.api.training import frozen_beside, with_new_adapter
from tokenward.artifacts import fingerprint
from tokenward.models.identity import has_encoder, model_sizes
from tokenward.models.loading import DTYPES, device_of
from tokenward.objectives import needs_of
from tokenward.ops.costs import (
    FLOAT,
    HALF,
    ModelSizes,
    NumberTypes,
    Work,
    forward_memory,
    forward_operations,
    generation_operations,
    training_memory,
    training_operations,
)
from tokenward.sampling import SamplingSettings
from tokenward.scoring.reads import token_values
from tokenward.selection.weights import weigh_rows
from tokenward.stages.base import Rows, Training
from tokenward.stages.run import Run
from tokenward.tokens.rows import TokenRow
from tokenward.tools.plan_steps import (
    Measured,
    chosen_rows,
    machine_rate,
    row_work,
    scoring_pass,
    seconds_per_token,
    steps_of,
    summed,
    training_step,
)

STORED_BYTES = 16
"""Of a token in the score store, before compression: id, two places, one value."""

TRIED_TOKENS = 2048
"""Tokens of the pass without gradients that is tried; what a larger one holds more is counted."""

EXAMPLE_ADAPTER: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


class StagePlan(NamedTuple):
    """What a stage will need; None where it cannot be said.

    Attributes:
        stage: Its name.
        work: What it does, in words.
        memory: Bytes, counted.
        peak: Bytes of a real step on the longest rows, Python and libraries included.
        seconds: Time, counted at the machine's rate.
        measured: Time by a real step.
        disk: Bytes that it leaves.
        note: What is not in these numbers.
    """

    stage: str
    work: str = ""
    memory: float | None = None
    peak: float | None = None
    seconds: float | None = None
    measured: float | None = None
    disk: float | None = None
    note: str = ""


class TrainingPlan(NamedTuple):
    """A planned training, and what its memory would be with other settings."""

    stage: StagePlan
    smaller: list[tuple[str, float]]


class Unit(NamedTuple):
    """Seconds of a piece of work, counted and measured; measured is None where nothing was."""

    counted: float
    measured: float | None

    def plus(self, other: "Unit") -> "Unit":
        """Both, one after the other."""
        known = self.measured is not None and other.measured is not None
        total = (self.measured or 0.0) + (other.measured or 0.0)
        return Unit(self.counted + other.counted, total if known else None)

    def times(self, factor: float) -> "Unit":
        """So often."""
        return Unit(self.counted * factor, None if self.measured is None else self.measured * factor)


class Planner:
    """Plans stages of one run.

    Args:
        run: The run.
        rows: Rows on which a pass without gradients is tried.
        prompts: Prompts to which a reply is tried.
        measure: Whether to carry out real steps.
    """

    def __init__(self, run: Run, rows: Rows, prompts: Sequence[Sequence[int]], *, measure: bool) -> None:
        self.run, self.measure = run, measure
        self._rows, self._prompts = rows, prompts
        table = run.recipe.model
        encoder = has_encoder(table.name, trust_remote_code=table.trust_remote_code)
        self._shared = table.packing != "none" and not encoder
        self._bytes = HALF if table.dtype == "bfloat16" else FLOAT
        self._rates: dict[str, float] = {}
        self._steps: dict[str, Measured] = {}

    def rate(self, number_type: str) -> float:
        """Operations a second of this machine, measured once for each number type."""
        if number_type not in self._rates:
            device = device_of(self.run.recipe.model.device)
            self._rates[number_type] = machine_rate(device, DTYPES[number_type])
        return self._rates[number_type]

    def sizes(self, name: str, adapter: dict[str, Any] | None = None) -> ModelSizes:
        """Sizes of a model."""
        trust = self.run.recipe.model.trust_remote_code
        return model_sizes(name, adapter=adapter, trust_remote_code=trust)

    def work(self, rows: Rows) -> np.ndarray:
        """Work of each row.  -> [rows 3]"""
        return row_work(rows, shared=self._shared)

    def training(self, item: Training) -> TrainingPlan:
        """A stage that trains a language model."""
        sizes, types = self.sizes(item.model, item.adapter), self._types(item.table)
        steps = steps_of(self.run, item.table, item.stage, len(item.rows))
        work = self.work(item.rows)
        longest = np.argsort(-work[:, 0], kind="stable")[: steps.micro]
        rows = self._weighted(item, longest)
        work[:, 1] *= _kept(rows)
        again = bool(steps.arguments.activation_checkpointing)
        operations = partial(training_operations, sizes, checkpointing=again)
        budget = steps.arguments.tokens_per_forward
        memory = training_memory(sizes, _largest_pass(work[longest], budget), types, checkpointing=again)
        total = steps.updates * operations(Work(*work.mean(axis=0).tolist()).times(steps.batch))
        rate = self.rate("bfloat16" if types.products == HALF else "float32")
        found = self._step(item, rows, operations(summed(work[longest]))) if self.measure else None
        time = Unit(total / rate, None if found is None else found.seconds * total)
        time = time.plus(self._meanwhile(item, steps.looks))
        plan = StagePlan(
            item.stage,
            f"{steps.updates} steps of {steps.batch}",
            memory.total,
            None if found is None else found.peak,
            *time,
            disk=self._model_bytes(item, sizes),
        )
        smaller = self._smaller(item, sizes, types, work[longest], budget, again)
        return TrainingPlan(plan, [(name, held) for name, held in smaller.items() if held < memory.total])

    def _smaller(
        self,
        item: Training,
        sizes: ModelSizes,
        types: NumberTypes,
        longest: np.ndarray,
        budget: int,
        again: bool,
    ) -> dict[str, float]:
        """Memory of a training with one setting changed, by the change."""
        whole, half = (_largest_pass(longest, tokens) for tokens in (budget, budget // 2))
        count = partial(training_memory, checkpointing=again)
        found = {
            "training.activation_checkpointing=true": training_memory(
                sizes, whole, types, checkpointing=True
            ),
            f"training.tokens_per_forward={budget // 2}": count(sizes, half, types),
            "training.bf16=true": count(sizes, whole, types._replace(products=HALF)),
            "model.dtype=bfloat16": count(sizes, whole, NumberTypes(HALF, HALF)),
        }
        if item.adapter is None:
            text = "model.adapter={r: 16, lora_alpha: 32, target_modules: all-linear}"
            found[text] = count(self.sizes(item.model, EXAMPLE_ADAPTER), whole, types)
        return {name: memory.total for name, memory in found.items()}

    def _types(self, table: dict[str, Any]) -> NumberTypes:
        coarse = bool(table.get("bf16") or table.get("fp16")) or self._bytes == HALF
        return NumberTypes(self._bytes, HALF if coarse else FLOAT)

    def _model_bytes(self, item: Training, sizes: ModelSizes) -> float:
        model = self._bytes * (sizes.weights if item.adapter is None else sizes.trained)
        # A stage keeps its checkpoints only where the recipe asks for them.
        kept = item.table.get("save_total_limit", 1) if "save_strategy" in item.table else 0
        return model + kept * (model + 2 * self._bytes * sizes.trained)

    def _weighted(self, item: Training, numbers: np.ndarray) -> list[TokenRow]:
        found = chosen_rows(item.rows, numbers)
        return found if item.selector is None else weigh_rows(item.selector, found)

    def _step(self, item: Training, rows: Sequence[TokenRow], operations: float) -> Measured:
        """Seconds of an operation, and the peak, of a real step; the same training on other rows is not tried again."""
        same = fingerprint([item.model, item.adapter, repr(item.objective), item.table])
        if same not in self._steps:
            found = self._tried(item, rows)
            self._steps[same] = found._replace(seconds=found.seconds / operations)
        return self._steps[same]

    def _tried(self, item: Training, rows: Sequence[TokenRow]) -> Measured:
        start = self.run.load(self.run.whole(item.model))
        model = with_new_adapter(start, item.adapter, self.run.recipe.seed)
        if needs_of(item.objective).reference:
            table = self.run.recipe.scores
            values = token_values(
                model, rows, precision=table.precision, tokens_per_batch=table.tokens_per_batch
            )
            rows = [replace(row, reference_logp=value) for row, value in zip(rows, values, strict=True)]
        where, device = f"{item.stage}.training", self.run.recipe.model.device
        beside = frozen_beside(model, item.objective, lambda trained: self.run.load(trained.name))
        return training_step(
            model, item.objective, rows, item.table, where=where, device=device, reference=beside
        )

    def _meanwhile(self, item: Training, looks: int) -> Unit:
        """Evaluations and replies during training."""
        time = Unit(0.0, 0.0)
        if looks:
            time = self.forward(self.work(item.eval)).times(looks)
        if item.watched and self._prompts:
            batches = (looks + 2) * self.run.recipe.fixed_prompts / len(self._prompts)
            time = time.plus(self.replies(batches))
        return time

    def forward(self, work: np.ndarray) -> Unit:
        """Passes without gradients over so much."""
        sizes = self.sizes(self.run.recipe.model.name)
        operations = forward_operations(sizes, summed(work)) if len(work) else 0.0
        counted = operations / self.rate(self.run.recipe.scores.precision)
        if not self.measure:
            return Unit(counted, None)
        rows, found = self._pass
        return Unit(counted, found.seconds * operations / forward_operations(sizes, summed(self.work(rows))))

    def forward_bytes(self) -> tuple[float, float | None]:
        """Memory of such a pass, counted and measured."""
        budget = self.run.recipe.scores.tokens_per_batch
        sizes, types = self.sizes(self.run.recipe.model.name), NumberTypes(self._bytes, self._bytes)
        counted = forward_memory(sizes, _largest_pass(self.work(self._rows), budget), types).total
        if not self.measure:
            return counted, None
        rows, found = self._pass
        tried = forward_memory(sizes, summed(self.work(rows)), types).total
        return counted, None if found.peak is None else found.peak + max(counted - tried, 0.0)

    @cached_property
    def _pass(self) -> tuple[list[TokenRow], Measured]:
        work, table = self.work(self._rows)[:, 0], self.run.recipe.scores
        longest = np.argsort(-work, kind="stable")
        budget = min(table.tokens_per_batch, TRIED_TOKENS)
        fitting = max(1, int((np.cumsum(work[longest]) <= budget).sum()))
        rows = chosen_rows(self._rows, longest[:fitting])
        model = self.run.load(self.run.recipe.model.name)
        return rows, scoring_pass(model, rows, table.precision)

    def replies(self, batches: float) -> Unit:
        """So many batches of replies as long as the evaluation allows; most end earlier."""
        table = self.run.recipe.evaluation
        sizes = self.sizes(self.run.recipe.model.name)
        operations = generation_operations(sizes, batches * len(self._prompts), table.max_new_tokens)
        measured = batches * table.max_new_tokens * self._per_token if self.measure else None
        return Unit(operations / self.rate(table.precision), measured)

    @cached_property
    def _per_token(self) -> float:
        table = self.run.recipe.evaluation
        settings = SamplingSettings(
            table.max_new_tokens, table.temperature, table.top_p, table.top_k, table.batch
        )
        model = self.run.load(self.run.recipe.model.name, dtype=table.precision)
        return seconds_per_token(model, self.run.style, self._prompts, settings)


def _kept(rows: Sequence[TokenRow]) -> float:
    """Share of response tokens with weight."""
    lengths = [len(ids) for row in rows for ids in row.responses]
    weights = [int((part != 0).sum()) for row in rows for part in row.weights or ()]
    return sum(weights) / sum(lengths) if weights else 1.0


def _largest_pass(work: np.ndarray, budget: int) -> Work:
    """The largest part of a batch that goes through the model at once: a row at least."""
    whole = work.sum(axis=0)
    tokens = max(min(whole[0], budget), work[:, 0].max())
    return Work(*(whole * tokens / whole[0]).tolist())
