"""How much each stage of a recipe has to do: rows, steps and lengths, before any model is loaded."""

import math
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.trainer_utils import IntervalStrategy

from tokenward.ops.costs import Work
from tokenward.stages.auxiliary import trained_auxiliary
from tokenward.stages.base import Rows
from tokenward.stages.run import AUXILIARY, Run
from tokenward.stages.scorers import made_scorer
from tokenward.stages.scores import scoring_models
from tokenward.stages.subset import looked_at
from tokenward.stages.tables import tables
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Template
from tokenward.training.arguments import TokenTrainingArguments, training_arguments


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
