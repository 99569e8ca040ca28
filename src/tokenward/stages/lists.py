"""The order of the stages, and which of them a recipe needs."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tokenward.config import LoadedRecipe, OnlineTable, check_unused
from tokenward.errors import UserError
from tokenward.evaluation.metrics import METRICS
from tokenward.plugins import find
from tokenward.sampling.checks import check_temperature
from tokenward.selection import selector_of
from tokenward.stages.auxiliary import check_auxiliary, is_needed, trained_auxiliary
from tokenward.stages.data import prepare_data
from tokenward.stages.early_checks import check_one_process, early_checks
from tokenward.stages.evaluation import evaluate
from tokenward.stages.examples import prepare_examples
from tokenward.stages.idle import idle_settings
from tokenward.stages.online import (
    head_mlp_settings,
    reward_settings,
    train_online,
    train_online_sft,
)
from tokenward.stages.online_checks import (
    check_not_online,
    check_objective,
    check_online,
    unused_settings,
)
from tokenward.stages.online_evaluation import check_metrics, evaluate_online
from tokenward.stages.oracle import train_auxiliary, train_oracle
from tokenward.stages.part_checks import (
    check_objective_without_scores,
    check_policy_objective,
    check_scorer,
    check_selection,
)
from tokenward.stages.policy import train_policy
from tokenward.stages.reward import train_reward
from tokenward.stages.reward_learning import reward_objective
from tokenward.stages.run import AUXILIARY, ONLINE_STAGES, STAGES, Run
from tokenward.stages.scorers import scorer_of
from tokenward.stages.scores import compute_reference, compute_scores
from tokenward.stages.subset_checks import check_subset
from tokenward.stages.tasks import SAMPLERS, source_of
from tokenward.stages.training import train_eval_reward, train_sft
from tokenward.stages.training_checks import check_pairs_fill_batches, training_checks
from tokenward.stages.unpaired_checks import check_unpaired

FUNCTIONS: dict[str, Callable[[Run], Any]] = {
    "data": prepare_data,
    "sft": train_sft,
    "reference": compute_reference,
    "oracle": train_oracle,
    "scores": compute_scores,
    "reward": train_reward,
    "policy": train_policy,
    "eval_reward": train_eval_reward,
    "evaluation": evaluate,
}

ONLINE_FUNCTIONS: dict[str, Callable[[Run], Any]] = {
    "examples": prepare_examples,
    "sft": train_online_sft,
    "online": train_online,
    "evaluation": evaluate_online,
}


SAME_PURPOSE = {"data": "examples", "policy": "online"}
"""Stages of a run on comparisons, and what an online run has in their place."""


def run_through(run: Run, last: str = "evaluation") -> None:
    """Carry out every stage up to ``last`` that is not done yet.

    Raises:
        UserError: a stage cannot work; what was finished stays finished.
    """
    if run.recipe.online is not None:
        last = SAME_PURPOSE.get(last, last)
    functions = dict(FUNCTIONS if run.recipe.online is None else ONLINE_FUNCTIONS)
    order: list[str] = list(STAGES if run.recipe.online is None else ONLINE_STAGES)
    if run.recipe.online is None:
        auxiliary = {
            f"{AUXILIARY}{name}": partial(train_auxiliary, name=name) for name in trained_auxiliary(run)
        }
        functions |= auxiliary
        # After every model that picks may read.
        order[order.index("scores") : order.index("scores")] = auxiliary
    if last not in order:
        kind = "on comparisons" if run.recipe.online is None else "guided"
        raise UserError(
            f"the recipe's run is {kind} and has no stage {last}; it has {', '.join(order)}. The table online makes a "
            "run an online one."
        )
    for line in idle_settings(run, last):
        run.display.line(f"note: {line}")
    # A stage that is left out makes what the scorer does not look at.
    wanted = [name for name in order[: order.index(last) + 1] if name == last or is_needed(run, name)]
    for name in wanted:
        functions[name](run)
        _look_at(run, name, wanted)


def _look_at(run: Run, stage: str, wanted: Sequence[str]) -> None:
    """What can be checked as soon as the data of a run is there."""
    if stage == "data":
        check_unpaired(run, wanted)
    if stage == "data" and wanted[-1] != "data":
        check_pairs_fill_batches(run)
    if stage == "examples" and wanted[-1] == "evaluation":
        check_metrics(run)


def check_recipe(loaded: LoadedRecipe) -> None:
    """Everything of a recipe that only the objects themselves can check, with its line in the file.

    Raises:
        UserError: an unknown name or setting, or several processes, before anything was read or trained.
    """
    check_one_process()
    recipe = loaded.recipe
    checks: dict[str, Callable[[], Any]] = {
        "scores.scorer": lambda: check_scorer(Run(recipe=recipe), scorer_of(Run(recipe=recipe))),
        **check_auxiliary(Run(recipe=recipe)),
        **check_subset(Run(recipe=recipe)),
        "oracle.objective": lambda: check_objective_without_scores("the oracle", recipe.oracle.objective),
        "reward.head": lambda: reward_settings(Run(recipe=recipe)),
        "reward.objective": lambda: reward_objective(Run(recipe=recipe)),
        "policy.selection": lambda: check_selection(Run(recipe=recipe)),
        "policy.objective": lambda: check_policy_objective(Run(recipe=recipe)),
        "evaluation.metrics": lambda: [find("metric", name, METRICS) for name in recipe.evaluation.metrics],
        "evaluation.temperature": lambda: check_temperature(
            recipe.evaluation.temperature, "evaluation.temperature"
        ),
        **early_checks(Run(recipe=recipe)),
    }
    if recipe.online is not None:
        checks |= _online_checks(Run(recipe=recipe), recipe.online)
    else:
        checks["model.head_mlp"] = lambda: check_not_online(Run(recipe=recipe))
    if recipe.eval_reward is not None:
        eval_reward = recipe.eval_reward.objective
        checks["eval_reward.objective"] = lambda: check_objective_without_scores(
            "the eval reward model", eval_reward
        )
    checks |= training_checks(recipe, loaded.lines)
    for name, table in recipe.auxiliary_models.items():
        checks[f"auxiliary_models.{name}.objective"] = partial(
            check_objective_without_scores, f"the auxiliary model {name}", table.objective
        )
    for where, check in checks.items():
        try:
            check()
        except UserError as error:
            raise UserError(f"{loaded.lines.where(where)}: {error}") from error
    check_unused(loaded)


def _online_checks(run: Run, table: OnlineTable) -> dict[str, Callable[[], Any]]:
    checks: dict[str, Callable[[], Any]] = {
        "online.selection": lambda: selector_of(table.selection, run.recipe.seed),
        "online.sampler": lambda: find("sampler", table.sampler.name, SAMPLERS),
        "online": lambda: check_online(run),
        "online.objective": lambda: check_objective(run, table),
        **{key: partial(_refuse, problem) for key, problem in unused_settings(run).items()},
    }
    head_mlp = run.recipe.model.head_mlp
    if head_mlp is not None:
        checks["model.head_mlp"] = lambda: head_mlp_settings(head_mlp)
    if run.recipe.prompt_task is None:
        checks["online.source"] = lambda: source_of(run)
    return checks


def _refuse(problem: str) -> None:
    raise UserError(problem)
