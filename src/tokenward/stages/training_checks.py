"""The ``training`` tables of a recipe: asked before anything runs whether every field of them can act here."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from tokenward.config import Lines, Recipe, check_training
from tokenward.errors import UserError
from tokenward.models.loading import device_of
from tokenward.models.sizes import model_sizes
from tokenward.stages.base import Checks, TrainingStage
from tokenward.stages.run import Run
from tokenward.training.arguments import check_batches, training_arguments
from tokenward.training.workable import unworkable

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
        looked_at = stage.key == "reward" and recipe.online is not None
        schedule = "constant" if stage.key in CONSTANT else "linear"
        check_training(table, where, lines, schedule=schedule, looked_at=looked_at)
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
