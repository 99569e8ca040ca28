"""How much each stage of a recipe has to do: rows, steps and lengths, before any model is loaded."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.trainer_utils import IntervalStrategy

from tokenward.config import AuxiliaryModelTable
from tokenward.objectives import SFT, Objective, objective_of
from tokenward.ops.costs import Work
from tokenward.selection import Selector, scope_of, selector_of, unit_of
from tokenward.stages.auxiliary import trained_auxiliary
from tokenward.stages.run import AUXILIARY, Run
from tokenward.stages.scorers import made_scorer
from tokenward.stages.scores import scoring_models
from tokenward.stages.subset import looked_at, picked_count
from tokenward.stages.tables import Tables, random_part, tables
from tokenward.stages.tasks import EncodedExamples, encoded_examples
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Template
from tokenward.training.arguments import TrainingArguments, training_arguments
from tokenward.types import Comparison

SPACED = 256
"""Prompts whose rollouts stand for all, evenly spaced by length."""


Rows = TokenTable | Sequence[TokenRow]


class Training(NamedTuple):
    """A stage that trains a language model.

    Attributes:
        stage: Its name.
        table: The recipe's ``training`` table.
        rows: What it trains on.
        objective: What it is trained with.
        adapter: Fields of ``peft.LoraConfig``, or None for every weight.
        model: What it starts from; where that is made by a stage before, what that one starts from.
        selector: From scores to weights, or None where every token counts.
        eval: Comparisons that an evaluation during training reads.
        watched: Whether fixed prompts are answered meanwhile.
    """

    stage: str
    table: dict[str, Any]
    rows: Rows
    objective: Objective
    adapter: dict[str, Any] | None
    model: str
    selector: Selector | None = None
    eval: Rows = ()
    watched: bool = False


def start_of(run: Run, model: str | None) -> str:
    """A model of the sizes of what a stage starts from, which may not be there yet."""
    return model or run.recipe.model.name


def trainings(run: Run, template: Template) -> list[Training]:
    """The stages of a run on comparisons that train a language model, in their order."""
    recipe, sets = run.recipe, tables(run, template)
    seen = random_part(run, sets.train, recipe.oracle.fraction, "oracle")
    inherited = recipe.oracle.adapter
    adapter = recipe.model.adapter if inherited == "inherit" else inherited
    found = []
    if recipe.sft is not None:
        best, eval_rows = sets.train.best_once(), sets.eval.best_once()
        start = recipe.model.name
        found.append(
            Training("sft", recipe.sft.training, best, SFT(), None, start, eval=eval_rows, watched=True)
        )
    oracle = objective_of("objective", recipe.oracle.objective)
    start = start_of(run, recipe.oracle.model)
    eval_rows = sets.eval
    found.append(Training("oracle", recipe.oracle.training, seen, oracle, adapter, start, eval=eval_rows))
    found += [_auxiliary_training(run, name, sets) for name in trained_auxiliary(run)]
    found.append(
        Training(
            "policy",
            recipe.policy.training,
            sets.train,
            objective_of("objective", recipe.policy.objective),
            recipe.model.adapter,
            start_of(run, recipe.policy.model),
            _selector(recipe.policy.selection, recipe.seed),
            eval_rows,
            watched=True,
        )
    )
    if recipe.eval_reward is not None:
        objective = objective_of("objective", recipe.eval_reward.objective)
        table = recipe.eval_reward.training
        found.append(
            Training(
                "eval_reward",
                table,
                sets.eval_reward,
                objective,
                recipe.model.adapter,
                start,
                None,
                eval_rows,
            )
        )
    return found


def _auxiliary_training(run: Run, name: str, sets: Tables) -> Training:
    table = run.recipe.auxiliary_models[name]
    rows = _auxiliary_rows(table, sets.train, random_part(run, sets.train, table.fraction, name))
    objective = objective_of("objective", table.objective)
    adapter = run.recipe.model.adapter if table.adapter == "inherit" else table.adapter
    start = start_of(run, table.model or run.recipe.oracle.model)
    return Training(
        f"{AUXILIARY}{name}", table.training or {}, rows, objective, adapter, start, eval=sets.eval
    )


def _auxiliary_rows(table: AuxiliaryModelTable, train: TokenTable, own: TokenTable) -> TokenTable:
    """An auxiliary model's part of the pairs, and the longest pairs in place of those that it will pick."""
    if table.subset is None:
        return own
    work = row_work(train, shared=True)[:, 0]
    count = picked_count(table.subset, torch.from_numpy(work))
    picked = train.choose(np.argsort(-work, kind="stable")[:count])
    return picked if table.subset.alone else own.then(picked)


class Scoring(NamedTuple):
    """The pass over the data for an auxiliary model's subset.

    Attributes:
        stage: The auxiliary model's.
        rows: Every prompt with the responses that are looked at.
        models: Those that pass.
    """

    stage: str
    rows: TokenTable
    models: list[str]


def subset_scorings(run: Run, template: Template) -> list[Scoring]:
    """The passes for the subset of the auxiliary models that are trained, in their order."""
    found: list[Scoring] = []
    for name in trained_auxiliary(run):
        subset = run.recipe.auxiliary_models[name].subset
        if subset is not None:
            rows = looked_at(tables(run, template).part("train"), subset).by_prompt()
            found.append(Scoring(f"{AUXILIARY}{name}", rows, scoring_models(made_scorer(subset.scorer))))
    return found


def _selector(table: Any, seed: int) -> Selector | None:
    selector = selector_of(table, seed)
    # Which tokens a batch, or a text's sentences, would keep is not counted: all are.
    return None if scope_of(selector) == "batch" or unit_of(selector) else selector


def online_trainings(run: Run, template: Template) -> list[Training]:
    """The stages of an online run on examples that train a language model, in their order."""
    recipe, online = run.recipe, run.recipe.online
    assert online is not None
    start, longest = recipe.model.name, online.sampling.max_new_tokens
    examples = encoded_examples(run, template, "train", reply=longest)
    written = [row for row in examples.rows if row.responses]
    found = []
    if recipe.sft is not None:
        found.append(Training("sft", recipe.sft.training, written, SFT(), None, start, watched=True))
    objective = objective_of("objective", online.objective)
    drawn = online.objective.name == "reinforce"
    rows = rollout_rows(examples, online.rollouts, longest) if drawn else written
    adapter = recipe.model.adapter
    found.append(Training("online", online.training, rows, objective, adapter, start, watched=True))
    return found


def rollout_rows(examples: EncodedExamples, count: int, length: int) -> list[TokenRow]:
    """Prompts with replies of full length in place of those that will be drawn; of many prompts, some."""
    prompts = sorted((context.prompt for context in examples.contexts), key=len, reverse=True)
    places = np.unique(np.linspace(0, len(prompts) - 1, min(SPACED, len(prompts))).astype(int))
    made = Comparison(key="", prompt=(), responses=("",) * count, ranks=(0,) * count, source="plan")
    return [TokenRow(made, prompts[place], [[0] * length] * count, [0] * count) for place in places]


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
    arguments: TrainingArguments


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
