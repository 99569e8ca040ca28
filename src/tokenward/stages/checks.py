"""Checks of a recipe that need no model and no data, made before anything is computed; and notes on unused keys."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import torch

from tokenward.config import Lines, Recipe, check_training
from tokenward.config.training import trackers_of
from tokenward.distributed import place
from tokenward.errors import UserError
from tokenward.models.default import HUB_NAME
from tokenward.models.identity import base_config, model_sizes
from tokenward.models.loading import device_of
from tokenward.sampling.classification import PromptTemplate
from tokenward.selection import selector_of
from tokenward.stages.auxiliary import is_needed, trained_auxiliary
from tokenward.stages.base import Checks, TrainingStage
from tokenward.stages.examples import prompt_parts
from tokenward.stages.online import reads_reward
from tokenward.stages.run import Run, check_start
from tokenward.training.arguments import check_batches, training_arguments, unworkable


def early_checks(run: Run) -> Checks:
    """Checks of the device, the models to start from and the templates."""
    recipe = run.recipe
    checks: Checks = {"model.device": lambda: _check_device(recipe.model.device)}
    for key, name in _named_models(recipe).items():
        checks[key] = partial(check_start, name, trust_remote_code=recipe.model.trust_remote_code)
    examples, task = recipe.examples, recipe.prompt_task
    if examples is not None:
        checks["examples.prompt"] = lambda: _check_prompt(examples.prompt)
    if task is not None:
        checks["prompt_task.template"] = lambda: PromptTemplate(task.template)
    return checks


def _named_models(recipe: Recipe) -> dict[str, str]:
    """The models that a recipe names, by key, except those of its auxiliary models."""
    named = {
        "model.name": recipe.model.name,
        "oracle.model": recipe.oracle.model,
        "reward.model": recipe.reward.model,
        "policy.model": recipe.policy.model,
        "prompt_task.model": recipe.prompt_task.model if recipe.prompt_task else None,
    }
    return {key: name for key, name in named.items() if name}


def check_models(run: Run) -> None:
    """Check that every model of a run is in its place or on the hub, before the first stage.

    Raises:
        UserError: a model is not there; with its key.
    """
    recipe = run.recipe
    auxiliary = {
        f"auxiliary_models.{name}.model": table.model for name, table in recipe.auxiliary_models.items()
    }
    for key, name in {**_named_models(recipe), **auxiliary}.items():
        if name and name not in ("default", HUB_NAME):
            try:
                base_config(name, trust_remote_code=recipe.model.trust_remote_code)
            except UserError as error:
                raise UserError(f"{key}: {error}", code=error.code, key=key) from error


def _check_device(name: str) -> None:
    device_of(name)  # refuses a name that torch does not know
    if place().count > 1 and ":" in name:
        raise UserError(
            f"the device is {name}, and {place().count} processes were started, which would all compute on it. Write "
            f"{name.partition(':')[0]}: each process takes its own.",
            code="one-device",
            key="model.device",
        )
    if name.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"the device is {name}, and torch finds no CUDA device. Write auto, which uses a GPU if there is one, or cpu.",
            code="no-cuda",
            key="model.device",
        )


def _check_prompt(template: str) -> None:
    if all(column is None for _, column in prompt_parts(template)):
        raise UserError(
            f"the prompt is {template!r}, which names no column, so every prompt would be the same. Write a column in braces, such "
            'as "Summarize: {article}".',
            code="missing-placeholder",
            key="examples.prompt",
        )


CONSTANT = ("reward", "online")
"""Tables whose learning rate is constant by default, as in the published code."""


def training_checks(recipe: Recipe, stages: Sequence[TrainingStage], lines: Lines) -> Checks:
    """Checks of the ``training`` tables of stages, by dotted key.

    Raises:
        UserError: a table has unknown fields, values of a wrong type or fields without effect.
    """
    found: Checks = {}
    dvclive: list[str] = []
    for stage in filter(lambda stage: stage.present(recipe), stages):
        table, where = stage.table(recipe).training, f"{stage.key}.training"
        evaluates = stage.key == "reward" and recipe.online is not None
        schedule = "constant" if stage.key in CONSTANT else "linear"
        check_training(table, where, lines, schedule=schedule, always_evaluates=evaluates)
        problems = [*_conflicts(recipe, stage.key, table)] or [*_unworkable(recipe, table, where)]
        for key, error in problems:
            found.setdefault(f"{where}.{key}" if key else where, partial(_refuse, error))
        if "dvclive" in trackers_of(table):
            dvclive.append(where)
    if len(dvclive) > 1:
        found.setdefault(f"{dvclive[1]}.report_to", partial(_refuse_dvclive, dvclive))
    return found


def _refuse_dvclive(where: Sequence[str]) -> NoReturn:
    raise UserError(
        f"{' and '.join(where)} report to dvclive, which has one folder, so each training would delete the figures of the one "
        "before. Keep it in one table, or use tensorboard.",
        code="conflicting-keys",
    )


def _refuse(error: UserError) -> NoReturn:
    raise error


def _conflicts(recipe: Recipe, stage: str, table: dict[str, Any]) -> Iterator[tuple[str, UserError]]:
    """Fields that the recipe's other tables rule out."""
    strategy, device = table.get("eval_strategy", "no"), recipe.model.device
    if stage == "online" and strategy != "no":
        message = (
            f"eval_strategy is {strategy}, and an online policy has no eval loss. Use online.evaluate_every, the number of steps "
            "between evaluations."
        )
        yield "eval_strategy", UserError(message, code="unused-key")
    if recipe.online is None and strategy != "no" and recipe.data.eval == 0:
        message = f"eval_strategy is {strategy}, but data.eval is 0, so there are no eval rows. Raise data.eval, or write no."
        yield "eval_strategy", UserError(message, code="no-eval-rows")
    if table.get("log_entropy") and stage == "reward":
        message = (
            "log_entropy is true, but a reward gives numbers and no distribution with an entropy. Remove it."
        )
        yield "log_entropy", UserError(message, code="unused-key")
    if table.get("tf32") and device_of(device).type != "cuda":
        message = f"tf32 needs a CUDA device, and model.device is {device}. Remove it."
        yield "tf32", UserError(message, code="no-cuda")


def _unworkable(recipe: Recipe, table: dict[str, Any], where: str) -> Iterator[tuple[str, UserError]]:
    """Fields that transformers, this machine or its packages refuse."""
    name = recipe.model.device
    with TemporaryDirectory() as scratch:
        try:
            kind = device_of(name).type
            arguments = training_arguments(table, folder=Path(scratch), seed=0, where=where, device=name)
        except UserError as error:
            yield "", error
        else:
            for key, message in unworkable(arguments, table, kind):
                yield key, UserError(message, code="unworkable-value")


def adapter_checks(recipe: Recipe, stages: Sequence[TrainingStage]) -> Checks:
    """A check of each adapter, by its key."""
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
            key = f"{stage.key}.training.disable_dropout"
            raise UserError(
                f"lora_dropout is {dropout}, but {key}, which defaults to true, sets every dropout to 0. Remove lora_dropout, or set "
                f"{key} to false.",
                code="conflicting-keys",
            )
    for model in dict.fromkeys(stage.start(recipe) for stage in stages):
        model_sizes(model, adapter=adapter, trust_remote_code=recipe.model.trust_remote_code)


def check_batches_filled(run: Run, stages: Sequence[TrainingStage]) -> None:
    """Check that no training drops its only batch.

    Raises:
        UserError: a training would have no update.
    """
    template = run.tokenizer_template(run.recipe.model.name)
    for stage in stages:
        table = stage.table(run.recipe).training
        if table.get("dataloader_drop_last") and (plan := stage.planned(run, template)) is not None:
            check_batches(table, len(plan.rows), f"{stage.key}.training")


_OF_THE_REWARD = ("reward", "samples", "reward_steps", "reward_groups", "reward_evals", "reward_patience", "every", "until", "restart")  # fmt: skip
_BESIDE = {"until": "every", "restart": "every", "evaluation_samples": "evaluate_every"}


def idle_settings(run: Run, last: str) -> list[str]:
    """A line for each table or key that is set but not used in a run up to the stage ``last``."""
    return [*(_of_comparisons(run, last) if run.recipe.online is None else _of_online(run))]


def _of_comparisons(run: Run, last: str) -> Iterator[str]:
    recipe = run.recipe
    unused = [
        stage
        for stage in ("oracle", "reward")
        if stage in recipe.model_fields_set and stage != last and not is_needed(run, stage)
    ]
    unused += [
        f"auxiliary_models.{name}"
        for name, table in recipe.auxiliary_models.items()
        if table.training and name not in trained_auxiliary(run)
    ]
    for key in unused:
        yield f"{key} is not used: the scorer {recipe.scores.scorer.name} does not read it"
    if recipe.policy.objective.name != "reinforce":
        for key in ("rollouts", "sampler", "sampling"):
            if key in recipe.policy.model_fields_set:
                yield f"policy.{key} is not used: only the objective reinforce trains on the policy's own replies"


def _of_online(run: Run) -> Iterator[str]:
    online, recipe = run.online, run.recipe
    written, name = online.model_fields_set, online.objective.name
    if "rollouts" in written and name != "reinforce":
        yield f"online.rollouts is not used: the objective {name} trains on references"
    if "selection" in written and name == "reinforce":
        yield "online.selection is not used: reinforce trains on every token of its samples"
    if not reads_reward(name, selector_of(online.selection, recipe.seed)):
        unused = [f"online.{key}" for key in _OF_THE_REWARD if key in written]
        for key in unused + (["reward"] if "reward" in recipe.model_fields_set else []):
            yield f"{key} is not used: every token has weight 1, whatever its reward"
        return
    for key, other in _BESIDE.items():
        if key in written and getattr(online, other) is None:
            yield f"online.{key} is not used: online.{other} is not set"
