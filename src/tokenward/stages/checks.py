"""Checks of a recipe that need no model and no data: asked before anything is computed."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import torch

from tokenward.config import Lines, OnlineTable, Recipe, check_training
from tokenward.errors import UserError
from tokenward.models.identity import model_sizes
from tokenward.models.loading import device_of
from tokenward.sampling.classification import PromptTemplate
from tokenward.selection import selector_of
from tokenward.stages.auxiliary import is_needed, trained_auxiliary
from tokenward.stages.base import Checks, TrainingStage
from tokenward.stages.examples import prompt_parts
from tokenward.stages.online import reads_reward
from tokenward.stages.run import Run, check_start
from tokenward.training.arguments import check_batches, training_arguments, unworkable


def early_checks(run: Run) -> dict[str, Callable[[], Any]]:
    """Checks by the dotted key that they are about."""
    checks: dict[str, Callable[[], Any]] = {"model.device": lambda: _device(run.recipe.model.device)}
    for key, name in _starts(run.recipe).items():
        trust = run.recipe.model.trust_remote_code
        checks[key] = partial(check_start, name, trust_remote_code=trust)
    examples, task = run.recipe.examples, run.recipe.prompt_task
    if examples is not None:
        checks["examples.prompt"] = lambda: _prompt(examples.prompt)
    if task is not None:
        checks["prompt_task.template"] = lambda: PromptTemplate(task.template)
    return checks


def _starts(recipe: Recipe) -> dict[str, str]:
    """The models that something trains from, by their keys; auxiliary models have checks of their own."""
    tables = {
        "model": recipe.model.name,
        "oracle": recipe.oracle.model,
        "reward": recipe.reward.model,
        "policy": recipe.policy.model,
    }
    return {
        f"{table}.{'name' if table == 'model' else 'model'}": name for table, name in tables.items() if name
    }


def check_one_process() -> None:
    """Refuse a run in several processes: each would want the same folders.

    Raises:
        UserError: torchrun or accelerate launch started this process beside others.
    """
    processes = os.environ.get("WORLD_SIZE", "1")  # of torchrun and accelerate launch
    if processes not in ("", "1"):
        raise UserError(
            f"a run works in one process, and this is one of {processes}. Start tokenward itself, without torchrun or "
            "accelerate launch."
        )


def _device(name: str) -> None:
    kind = name.partition(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"model.device is {name}, and torch sees no CUDA device on this machine. Write model.device: auto, which takes a "
            "GPU where there is one, or cpu."
        )


def _prompt(template: str) -> None:
    if all(column is None for _, column in prompt_parts(template)):
        raise UserError(
            f"examples.prompt is {template!r}, which names no column of the data, so every prompt would be the same. Write the "
            'column in braces, such as prompt: "Summarize: {article}".'
        )


CONSTANT = ("reward", "online")
"""Tables whose learning rate stays as it is unless they say otherwise: the published code's default."""


def training_checks(recipe: Recipe, stages: Sequence[TrainingStage], lines: Lines) -> Checks:
    """What is wrong with the ``training`` tables of stages, by dotted key.

    Raises:
        UserError: for unknown keys, values of a wrong type and fields that cannot act, each with its line.
    """
    found: Checks = {}
    for stage in filter(lambda stage: stage.present(recipe), stages):
        table, where = stage.table(recipe).training, f"{stage.key}.training"
        evaluates = stage.key == "reward" and recipe.online is not None
        schedule = "constant" if stage.key in CONSTANT else "linear"
        check_training(table, where, lines, schedule=schedule, always_evaluates=evaluates)
        problems = [*_of_the_run(recipe, stage.key, table)] or [*_of_the_machine(recipe, table, where)]
        for key, message in problems:
            found.setdefault(f"{where}.{key}" if key else where, partial(_refuse, message))
    return found


def adapter_checks(recipe: Recipe, stages: Sequence[TrainingStage]) -> Checks:
    """A check for each adapter that is written, by its key."""
    found: dict[str, list[TrainingStage]] = {}
    for stage in stages:
        key, adapter = stage.adapter(recipe)
        if adapter is not None and stage.present(recipe):
            found.setdefault(key, []).append(stage)
    return {key: partial(_check_adapter, recipe, uses) for key, uses in found.items()}


def _check_adapter(recipe: Recipe, stages: list[TrainingStage]) -> None:
    adapter = stages[0].adapter(recipe)[1]
    assert adapter is not None
    dropout = adapter.get("lora_dropout")
    for stage in stages:
        if dropout and stage.table(recipe).training.get("disable_dropout", True):
            raise UserError(
                f"lora_dropout is {dropout}, and {stage.key}.training.disable_dropout, which is true unless it is written, sets "
                f"every dropout to 0. Leave lora_dropout out, or write {stage.key}.training.disable_dropout: false."
            )
    for model in dict.fromkeys(stage.start(recipe) for stage in stages):
        model_sizes(model, adapter=adapter, trust_remote_code=recipe.model.trust_remote_code)


def check_batches_filled(run: Run, stages: Sequence[TrainingStage]) -> None:
    """Refuse a training that would drop its only batch.

    Raises:
        UserError: as above.
    """
    template = run.tokenizer_template(run.recipe.model.name)
    for stage in stages:
        table = stage.table(run.recipe).training
        if table.get("dataloader_drop_last") and (plan := stage.planned(run, template)) is not None:
            check_batches(table, len(plan.rows), f"{stage.key}.training")


def _refuse(message: str) -> NoReturn:
    raise UserError(message)


def _of_the_run(recipe: Recipe, stage: str, table: dict[str, Any]) -> Iterator[tuple[str, str]]:
    evaluates = table.get("eval_strategy", "no") != "no"
    if stage == "online" and evaluates:
        yield (
            "eval_strategy",
            f"eval_strategy is {table['eval_strategy']}, and an online policy has no held-out loss. Write online.evaluate_every: the "
            "updates between two looks at it.",
        )
    if recipe.online is None and evaluates and recipe.data.eval == 0:
        yield (
            "eval_strategy",
            f"eval_strategy is {table['eval_strategy']}, and data.eval is 0, so there is no comparison to evaluate on. Raise "
            "data.eval, or write eval_strategy: no.",
        )
    if table.get("log_entropy") and stage == "reward":
        yield (
            "log_entropy",
            "log_entropy is true, but a reward gives a token a number and no distribution that had an entropy. Leave it out here.",
        )
    if table.get("tf32") and device_of(recipe.model.device).type != "cuda":
        yield (
            "tf32",
            f"tf32 needs a CUDA device, and model.device is {recipe.model.device} here. Leave it out.",
        )


def _of_the_machine(recipe: Recipe, table: dict[str, Any], where: str) -> Iterator[tuple[str, str]]:
    with TemporaryDirectory() as scratch:
        try:
            device = device_of(recipe.model.device).type
            arguments = training_arguments(
                table, folder=Path(scratch), seed=0, where=where, device=recipe.model.device
            )
        except UserError as error:
            yield "", str(error)
        else:
            yield from unworkable(arguments, table, device)


OF_THE_REWARD = (
    "samples",
    "reward_steps",
    "reward_groups",
    "reward_evals",
    "reward_patience",
    "every",
    "until",
    "restart",
)
"""Keys of ``online`` that say how its reward is learned."""

BESIDE = {"until": "every", "restart": "every", "evaluation_samples": "evaluate_every"}
"""Keys of ``online`` that act beside another alone."""


def idle_settings(run: Run, last: str) -> list[str]:
    """A line for each table or key that was written and is not read.

    Args:
        run: The run.
        last: The stage that it ends with, which is carried out whether it is read or not.
    """
    online = run.recipe.online
    return [*(_of_comparisons(run, last) if online is None else _of_online(run, online))]


def _of_comparisons(run: Run, last: str) -> Iterator[str]:
    recipe, scorer = run.recipe, run.recipe.scores.scorer.name
    for stage in ("oracle", "reward"):
        if stage in recipe.model_fields_set and stage != last and not is_needed(run, stage):
            yield f"the table {stage} is not read: the scorer {scorer} looks at no number of it"
    unread = [
        name
        for name, table in recipe.auxiliary_models.items()
        if table.training and name not in trained_auxiliary(run)
    ]
    for name in unread:
        yield f"the table auxiliary_models.{name} is not read: the scorer {scorer} looks at no number of it"


def _of_online(run: Run, online: OnlineTable) -> Iterator[str]:
    written, drawn = online.model_fields_set, online.objective.name == "reinforce"
    if "rollouts" in written and not drawn:
        yield f"online.rollouts is not read: the objective {online.objective.name} draws no replies to train on"
    if "selection" in written and drawn:
        yield "online.selection is not read: reinforce trains on every token of its own replies"
    if not reads_reward(online.objective.name, selector_of(online.selection, run.recipe.seed)):
        idle = [f"online.{key}" for key in OF_THE_REWARD if key in written]
        idle += ["the table reward"] if "reward" in run.recipe.model_fields_set else []
        for key in idle:
            yield f"{key} is not read: every token has weight 1, whatever a reward would say"
        return
    for key, other in BESIDE.items():
        if key in written and getattr(online, other) is None:
            yield f"online.{key} is not read: online.{other} is not written"
