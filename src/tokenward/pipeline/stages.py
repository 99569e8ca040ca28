"""The order of the stages, and which of them a recipe needs."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenward.config import LoadedRecipe, check_training
from tokenward.errors import UserError
from tokenward.evaluation.metrics import METRICS
from tokenward.pipeline.context import STAGES, Run
from tokenward.pipeline.data import prepare_data
from tokenward.pipeline.evaluate_stage import evaluate
from tokenward.pipeline.score_stages import compute_reference, compute_scores, needs
from tokenward.pipeline.train_stages import (
    objective_of,
    selector_of,
    train_oracle,
    train_policy,
    train_referee,
    train_sft,
)
from tokenward.pipeline.values import scorer_of
from tokenward.plugins import find
from tokenward.training.arguments import training_arguments

FUNCTIONS: dict[str, Callable[[Run], Any]] = {
    "data": prepare_data,
    "sft": train_sft,
    "reference": compute_reference,
    "oracle": train_oracle,
    "scores": compute_scores,
    "policy": train_policy,
    "referee": train_referee,
    "evaluation": evaluate,
}


def run_through(run: Run, last: str = "evaluation") -> None:
    """Carry out every stage up to ``last`` that is not done yet.

    Raises:
        UserError: a stage cannot work; what was finished stays finished.
    """
    for name in STAGES[: STAGES.index(last) + 1]:
        if name == "oracle" and last != "oracle" and not needs(run, "oracle_logp"):
            continue  # the scorer does not look at an oracle
        FUNCTIONS[name](run)


def check_recipe(loaded: LoadedRecipe) -> None:
    """Everything of a recipe that only the objects themselves can check, with its line in the file.

    Raises:
        UserError: an unknown name or setting, before anything was read or trained.
    """
    recipe = loaded.recipe
    checks: dict[str, Callable[[], Any]] = {
        "scores.scorer": lambda: scorer_of(Run(recipe=recipe)),
        "oracle.objective": lambda: objective_of("objective", recipe.oracle.objective),
        "policy.selection": lambda: selector_of(recipe.policy.selection, recipe.seed),
        "policy.objective": lambda: objective_of("objective", recipe.policy.objective),
        "evaluation.metrics": lambda: [find("metric", name, METRICS) for name in recipe.evaluation.metrics],
    }
    if recipe.referee is not None:
        referee = recipe.referee.objective
        checks["referee.objective"] = lambda: objective_of("objective", referee)
    for stage in ("sft", "oracle", "policy", "referee"):
        table = getattr(recipe, stage)
        if table is not None:
            where = f"{stage}.training"
            check_training(table.training, where, loaded.lines)
            checks[where] = partial(_training_values, table.training, where)
    for where, check in checks.items():
        try:
            check()
        except UserError as error:
            raise UserError(f"{loaded.lines.where(where)}: {error}") from error


def _training_values(table: dict[str, Any], where: str) -> None:
    with TemporaryDirectory() as scratch:
        training_arguments(table, folder=Path(scratch), seed=0, where=where)
