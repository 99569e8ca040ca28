"""The ``training`` tables of a recipe: asked before anything runs whether every field of them can act here."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from tokenward.config import Lines, Recipe, check_training
from tokenward.errors import UserError
from tokenward.models.loading import device_of
from tokenward.stages.run import Run
from tokenward.stages.tables import random_part
from tokenward.stages.tables import tables as table_sets
from tokenward.training.arguments import check_batches, training_arguments
from tokenward.training.workable import unworkable

CONSTANT = ("reward", "online")
"""Tables whose learning rate stays as it is unless they say otherwise: the published code's default."""


def training_tables(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Every ``training`` table that a recipe has, by the dotted key of the table around it."""
    names = ("sft", "oracle", "reward", "policy", "eval_reward", "online")
    tables = {name: getattr(recipe, name) for name in names}
    tables |= {f"auxiliary_models.{name}": table for name, table in recipe.auxiliary_models.items()}
    found = {name: table.training for name, table in tables.items() if table is not None}
    return {name: table for name, table in found.items() if table is not None}


def training_checks(recipe: Recipe, lines: Lines) -> dict[str, partial[NoReturn]]:
    """What is wrong with them, by dotted key.

    Raises:
        UserError: for unknown keys, values of a wrong type and fields that cannot act, each with its line.
    """
    found = {}
    for stage, table in training_tables(recipe).items():
        where = f"{stage}.training"
        looked_at = stage == "reward" and recipe.online is not None
        schedule = "constant" if stage in CONSTANT else "linear"
        check_training(table, where, lines, schedule=schedule, looked_at=looked_at)
        problems = [*_of_the_run(recipe, stage, table)] or [*_of_the_machine(recipe, table, where)]
        for key, message in problems:
            found.setdefault(f"{where}.{key}" if key else where, partial(_refuse, message))
    return found


def check_pairs_fill_batches(run: Run) -> None:
    """Refuse a run on comparisons some training of which would drop its only batch; asked as soon as there are pairs.

    Raises:
        UserError: as above.
    """
    tables = training_tables(run.recipe)
    if not any(table.get("dataloader_drop_last") for table in tables.values()):
        return
    sets = table_sets(run, run.tokenizer_template(run.recipe.model.name))
    train = len(sets.train)
    counts = {
        "sft": train,
        "oracle": len(random_part(run, sets.train, run.recipe.oracle.fraction, "oracle")),
        "policy": train,
        "eval_reward": len(sets.eval_reward),
    }
    for stage, table in tables.items():
        check_batches(table, counts.get(stage, train), f"{stage}.training")


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
