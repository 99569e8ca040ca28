"""The stages of a run in order: one list for runs on comparisons, one for online runs."""

from functools import partial

from tokenward.artifacts import DamagedFiles, Manifest, StagePart, said
from tokenward.config import LoadedRecipe, Recipe, check_unused
from tokenward.distributed import first_alone
from tokenward.errors import UserError
from tokenward.stages.auxiliary import check_auxiliary, trained_auxiliary
from tokenward.stages.base import Checks, Stage, TrainingStage
from tokenward.stages.checks import (
    adapter_checks,
    check_batches_filled,
    check_models,
    early_checks,
    idle_settings,
    training_checks,
)
from tokenward.stages.data import DataStage
from tokenward.stages.evaluation import EvaluationStage
from tokenward.stages.examples import ExamplesStage
from tokenward.stages.online import OnlineSftStage, OnlineStage
from tokenward.stages.online_checks import ACROSS_TABLES, check_not_online, online_checks
from tokenward.stages.online_evaluation import OnlineEvaluationStage
from tokenward.stages.oracle import AuxiliaryStage, OracleStage
from tokenward.stages.policy import PolicyStage
from tokenward.stages.reward import RewardStage
from tokenward.stages.run import Run
from tokenward.stages.scores import ReferenceStage, ScoresStage, ValuesStage
from tokenward.stages.subset import check_subset
from tokenward.stages.tables import remove_damaged_tables, tables
from tokenward.stages.training import EvalRewardStage, SftStage

BEFORE_AUXILIARY = (DataStage(), SftStage(), ReferenceStage(), OracleStage(), RewardStage())
AFTER_AUXILIARY = (ScoresStage(), PolicyStage(), EvalRewardStage(), EvaluationStage())
ONLINE = (ExamplesStage(), OnlineSftStage(), OnlineStage(), OnlineEvaluationStage())

_IN_ONLINE_RUNS = {
    "data": "examples",
    "policy": "online",
}  # stages that replace those of a run on comparisons

RESULTS = ("online", "policy")
"""Stages that train the final model of a run."""

NAMES = tuple(dict.fromkeys(stage.name for stage in (*BEFORE_AUXILIARY, *AFTER_AUXILIARY, *ONLINE)))
"""Names of all stages except those of auxiliary models."""


def possible_stages(recipe: Recipe) -> list[Stage]:
    """Every stage that a run of this kind can have; auxiliary models in the order of the recipe."""
    if recipe.online is not None:
        return [*ONLINE]
    auxiliary = [AuxiliaryStage(name) for name, table in recipe.auxiliary_models.items() if table.training]
    return [*BEFORE_AUXILIARY, *auxiliary, *AFTER_AUXILIARY]


def stages_of(run: Run) -> list[Stage]:
    """The stages of a run in order, with those auxiliary models that are read."""
    if run.recipe.online is not None:
        return [*ONLINE]
    return [*BEFORE_AUXILIARY, *map(AuxiliaryStage, trained_auxiliary(run)), *AFTER_AUXILIARY]


def wanted_stages(run: Run, last: str = "evaluation") -> list[Stage]:
    """The stages up to ``last`` whose output is read.

    Raises:
        UserError: the run has no such stage.
    """
    order, online = stages_of(run), run.recipe.online is not None
    last = _IN_ONLINE_RUNS.get(last, last) if online else last
    names = [stage.name for stage in order]
    if last not in names:
        kind = "an online run" if online else "a run on comparisons"
        raise UserError(
            f"there is no stage {last}: this is {kind}, with the stages {', '.join(names)}. A recipe with an online table makes an "
            "online run.",
            code="unknown-stage",
        )
    until = order[: names.index(last) + 1]
    return [stage for stage in until if stage.name == last or stage.needed(run)]


def run_through(run: Run, last: str = "evaluation") -> None:
    """Carry out every stage up to ``last`` that is not done yet. A damaged stage is made again.

    Raises:
        UserError: a stage cannot work. Finished stages stay finished.
    """
    damaged = first_alone(lambda: remove_damaged_tables(run))
    while True:
        try:
            _run_once(run, last)
            if damaged and run.recipe.online is None:
                tables(run, run.tokenizer_template(run.recipe.model.name))
        except DamagedFiles as error:
            if error.stage in run.suspected:
                raise
            run.suspected.add(error.stage)
            run.display.line(f"  damaged: {said(error.folder, error.found)}. {error.stage} is made again")
        else:
            return


def _run_once(run: Run, last: str) -> None:
    wanted = wanted_stages(run, last)
    first_alone(lambda: check_models(run))
    for line in idle_settings(run, wanted[-1].name):
        run.display.line(f"note: {line}. The run is the same without it")
    first, *others = wanted
    first.carry_out(run)
    first_alone(lambda: check_data(run, wanted))
    for stage in others:
        stage.carry_out(run)


def write_part(run: Run, part: StagePart) -> bool:
    """Write a part of the reference's values and, if the stages before them are finished, a part of the scores.

    Returns:
        Whether the scores are finished.

    Raises:
        UserError: a stage that works in one process is not finished, or a stage cannot work.
    """
    wanted = [stage for stage in wanted_stages(run, "scores") if stage.present(run.recipe)]
    check_models(run)
    wrote = False
    for stage in wanted:
        if isinstance(stage, ValuesStage):
            state = stage.carry_out_part(run, part)
            if state == "waits":
                return False
            wrote = wrote or state == "done"
        elif problem := stage.unfinished(run):
            if wrote:  # this job has done what it could
                run.display.line(f"  next: {_command(stage)} in one job. Then start the parts again")
                return False
            raise UserError(
                f"the stage {stage.name} {problem}, and it works in one process, not in parts. Run it in one job first: "
                f"{_command(stage)}. Then start the parts again.",
                code="stage-unfinished",
            )
        if stage is wanted[0]:
            check_data(run, wanted)
    return True


def _command(stage: Stage) -> str:
    if stage.name in ("data", "oracle", "reward"):
        return f"tokenward {stage.name} RECIPE"
    return f'tokenward.run("RECIPE", last="{stage.name}")'


def check_data(run: Run, wanted: list[Stage]) -> None:
    """Check that the data suits every stage, before a model is loaded. The data stage is finished.

    Raises:
        UserError: it does not suit a stage.
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
    count, total = sum(facts["unpaired"].values()), facts["train"] + facts["eval"]
    problem = next(filter(None, (stage.unpaired_problem(run) for stage in wanted)), "") if count else ""
    if problem:
        message = f"{count} of {total} rows have one response each (unpaired rows), and {problem}"
        raise UserError(message, code="needs-pairs")


def carry_out(run: Run, name: str) -> Manifest:
    """Carry out one stage, even if nothing reads its output. The stages before it are finished."""
    stage = next(stage for stage in possible_stages(run.recipe) if stage.name == name)
    stage.carry_out(run)
    return run.done(name)


def check_recipe(loaded: LoadedRecipe) -> None:
    """Check everything in a recipe that needs no data and no model.

    Raises:
        UserError: with the line in the file; nothing has been read or trained.
    """
    run = Run(recipe=loaded.recipe)
    for key, check in _checks(run, loaded).items():
        try:
            check()
        except UserError as error:
            # Other errors may have the key of a library setting, such as data.source for a file of spans.
            precise = error.key.startswith(f"{key}.") or (error.key and key in ACROSS_TABLES)
            place = error.key if precise else key
            message = f"{loaded.lines.where(place)}: {error}"
            raise UserError(message, code=error.code, key=place) from error
    check_unused(loaded)


def _checks(run: Run, loaded: LoadedRecipe) -> Checks:
    """Every check, including those of stages that this kind of run does not have: their tables may be set."""
    checks: Checks = {**check_auxiliary(run), **check_subset(run)}
    auxiliary = [AuxiliaryStage(name) for name in run.recipe.auxiliary_models]
    every = {stage.name: stage for stage in (*ONLINE, *BEFORE_AUXILIARY, *auxiliary, *AFTER_AUXILIARY)}
    for stage in every.values():
        checks |= stage.checks(run)
    training = [stage for stage in possible_stages(run.recipe) if isinstance(stage, TrainingStage)]
    checks |= early_checks(run) | adapter_checks(run.recipe, training)
    if run.recipe.online is not None:
        checks |= online_checks(run)
    else:
        checks["model.head_mlp"] = partial(check_not_online, run)
    tables = [stage for stage in every.values() if isinstance(stage, TrainingStage)]
    return checks | training_checks(run.recipe, tables, loaded.lines)
