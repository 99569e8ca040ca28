"""The stages of a run, in their order: one list for runs on comparisons, one for online runs."""

from functools import partial

from tokenward.artifacts import Manifest
from tokenward.config import LoadedRecipe, Recipe, check_unused
from tokenward.errors import UserError
from tokenward.stages.auxiliary import check_auxiliary, trained_auxiliary
from tokenward.stages.base import Checks, Stage, TrainingStage
from tokenward.stages.checks import (
    adapter_checks,
    check_batches_filled,
    check_one_process,
    early_checks,
    idle_settings,
    training_checks,
)
from tokenward.stages.data import DataStage
from tokenward.stages.evaluation import EvaluationStage
from tokenward.stages.examples import ExamplesStage
from tokenward.stages.online import OnlineSftStage, OnlineStage
from tokenward.stages.online_checks import check_not_online, online_checks
from tokenward.stages.online_evaluation import OnlineEvaluationStage
from tokenward.stages.oracle import AuxiliaryStage, OracleStage
from tokenward.stages.policy import PolicyStage
from tokenward.stages.reward import RewardStage
from tokenward.stages.run import Run
from tokenward.stages.scores import ReferenceStage, ScoresStage
from tokenward.stages.subset import check_subset
from tokenward.stages.training import EvalRewardStage, SftStage

BEFORE_AUXILIARY = (DataStage(), SftStage(), ReferenceStage(), OracleStage(), RewardStage())
AFTER_AUXILIARY = (ScoresStage(), PolicyStage(), EvalRewardStage(), EvaluationStage())
ONLINE = (ExamplesStage(), OnlineSftStage(), OnlineStage(), OnlineEvaluationStage())

SAME_PURPOSE = {"data": "examples", "policy": "online"}
"""Stages of a run on comparisons, and what an online run has in their place."""

RESULTS = ("online", "policy")
"""Stages whose model is the result of a run."""

NAMES = tuple(dict.fromkeys(stage.name for stage in (*BEFORE_AUXILIARY, *AFTER_AUXILIARY, *ONLINE)))
"""Names of all stages but those of auxiliary models."""


def possible_stages(recipe: Recipe) -> list[Stage]:
    """Every stage that such a recipe can have, whether it has its table or not. Auxiliary models are in the recipe's order."""
    if recipe.online is not None:
        return [*ONLINE]
    auxiliary = [AuxiliaryStage(name) for name, table in recipe.auxiliary_models.items() if table.training]
    return [*BEFORE_AUXILIARY, *auxiliary, *AFTER_AUXILIARY]


def stages_of(run: Run) -> list[Stage]:
    """The stages of a run, in their order. Of the auxiliary models those are trained that something reads."""
    if run.recipe.online is not None:
        return [*ONLINE]
    return [*BEFORE_AUXILIARY, *map(AuxiliaryStage, trained_auxiliary(run)), *AFTER_AUXILIARY]


def wanted_stages(run: Run, last: str = "evaluation") -> list[Stage]:
    """The stages up to ``last`` that something reads.

    Raises:
        UserError: the run has no stage of this name.
    """
    order = stages_of(run)
    last = SAME_PURPOSE.get(last, last) if run.recipe.online is not None else last
    names = [stage.name for stage in order]
    if last not in names:
        kind = "on comparisons" if run.recipe.online is None else "online"
        raise UserError(
            f"the recipe's run is {kind} and has no stage {last}. It has {', '.join(names)}. The table online makes a run an "
            "online one."
        )
    until = order[: names.index(last) + 1]
    return [stage for stage in until if stage.name == last or stage.needed(run)]


def run_through(run: Run, last: str = "evaluation") -> None:
    """Carry out every stage up to ``last`` that is not done yet.

    Raises:
        UserError: a stage cannot work. What is finished stays finished.
    """
    wanted = wanted_stages(run, last)
    for line in idle_settings(run, wanted[-1].name):
        run.display.line(f"note: {line}")
    first, *others = wanted
    first.carry_out(run)
    check_data(run, wanted)
    for stage in others:
        stage.carry_out(run)


def check_data(run: Run, wanted: list[Stage]) -> None:
    """Refuse stages that the data cannot feed, as soon as it is there and before a model is loaded.

    Raises:
        UserError: says which stage, and what to write.
    """
    present = [stage for stage in wanted if stage.present(run.recipe)]
    if run.recipe.online is None:
        _check_unpaired(run, present)
        if len(wanted) > 1:
            check_batches_filled(run, [stage for stage in present if isinstance(stage, TrainingStage)])
    for stage in present:
        stage.check_data(run)


def _check_unpaired(run: Run, wanted: list[Stage]) -> None:
    facts = run.done("data").facts
    count = sum(facts["unpaired"].values())
    problem = next(filter(None, (stage.unpaired_problem(run) for stage in wanted)), "") if count else ""
    if problem:
        total = facts["train"] + facts["eval"]
        raise UserError(f"{count} of {total} rows have one response each (unpaired rows), and {problem}")


def carry_out(run: Run, name: str) -> Manifest:
    """Carry out one stage, whether something reads it or not; the stages before it are finished."""
    stage = next(stage for stage in possible_stages(run.recipe) if stage.name == name)
    stage.carry_out(run)
    return run.done(name)


def check_recipe(loaded: LoadedRecipe) -> None:
    """Everything of a recipe that only the objects themselves can check, with its line in the file.

    Raises:
        UserError: an unknown name or setting, or several processes, before anything was read or trained.
    """
    check_one_process()
    run = Run(recipe=loaded.recipe)
    for where, check in _checks(run, loaded).items():
        try:
            check()
        except UserError as error:
            raise UserError(f"{loaded.lines.where(where)}: {error}") from error
    check_unused(loaded)


def _checks(run: Run, loaded: LoadedRecipe) -> Checks:
    """Every check, of a stage that this kind of run does not have too: its table may be written."""
    checks: Checks = {**check_auxiliary(run), **check_subset(run)}
    auxiliary = [AuxiliaryStage(name) for name in run.recipe.auxiliary_models]
    every = {stage.name: stage for stage in (*ONLINE, *BEFORE_AUXILIARY, *auxiliary, *AFTER_AUXILIARY)}
    for stage in every.values():
        checks |= stage.checks(run)
    training = [stage for stage in possible_stages(run.recipe) if isinstance(stage, TrainingStage)]
    checks |= early_checks(run) | adapter_checks(run.recipe, training)
    if run.recipe.online is not None:
        checks |= online_checks(run, run.recipe.online)
    else:
        checks["model.head_mlp"] = partial(check_not_online, run)
    tables = [stage for stage in every.values() if isinstance(stage, TrainingStage)]
    return checks | training_checks(run.recipe, tables, loaded.lines)
