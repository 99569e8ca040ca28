"""``tokenward plan RECIPE``: memory, time and disk of each stage before it starts."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokenward.display import Display
from tokenward.models.loading import device_of
from tokenward.ops.costs import FLOAT, HALF, NumberTypes, Work, training_memory
from tokenward.stages.auxiliary import scorer_of
from tokenward.stages.base import TrainingStage
from tokenward.stages.lists import check_data, stages_of, wanted_stages
from tokenward.stages.run import AUXILIARY, Run
from tokenward.stages.scores import scoring_models
from tokenward.stages.tables import tables
from tokenward.stages.tasks import encoded_examples, labelled_parts
from tokenward.tokens.encode import check_some_left
from tokenward.tools.plan_stages import STORED_BYTES, Planner, StagePlan, TrainingPlan, Unit
from tokenward.tools.plan_steps import SubsetPass, free_memory, subset_passes
from tokenward.tools.run import open_run

NOT_PLANNED = "-"

SUBSET = ", subset"
"""After the name of an auxiliary model's stage: the pass in which its comparisons are picked."""


class Plan(NamedTuple):
    """A recipe's stages, and the machine.

    Attributes:
        stages: In their order.
        smaller: Settings, and what the largest training would hold with each, bytes, counted.
        largest: Name of that training.
        free: Bytes of memory that are free now, or None.
    """

    stages: list[StagePlan]
    smaller: list[tuple[str, float]]
    largest: str
    free: float | None


def plan_recipe(
    recipe: str | Path, overrides: Sequence[str] = (), *, measure: bool = True, quiet: bool = False
) -> Plan:
    """Plan a recipe and show the plan.

    The run's folder gets the data stage and the ids of its texts, whose lengths every plan must know, and nothing else.

    Args:
        recipe: Path of a YAML file.
        overrides: ``"a.b=value"`` changes.
        measure: Carry out one real step of each training on its longest rows; without it everything is counted.
        quiet: Show nothing.

    Raises:
        UserError: something in the recipe or the data cannot work.
    """
    run = open_run(recipe, overrides, quiet=quiet)
    stages, found = _comparisons(run, measure) if run.recipe.online is None else _online(run, measure)
    largest = max(found, key=lambda plan: plan.stage.memory or 0.0, default=None)
    free = free_memory(device_of(run.recipe.model.device))
    plan = Plan(stages, largest.smaller if largest else [], largest.stage.stage if largest else "", free)
    _show(run.display, plan, measure)
    return plan


def _comparisons(run: Run, measure: bool) -> tuple[list[StagePlan], list[TrainingPlan]]:
    wanted = wanted_stages(run)
    wanted[0].carry_out(run)
    check_data(run, wanted)
    template = run.tokenizer_template(run.recipe.model.name)
    sets = tables(run, template)
    check_some_left(sets.summed)
    table = run.recipe.evaluation
    tried = [row.prompt for row in sets.eval.by_prompt()[: min(table.prompts, table.batch)]]
    planner = Planner(run, sets.train.then(sets.eval_reward).by_prompt(), tried, measure=measure)
    work = planner.work(sets.everything)
    subsets = {item.stage: item for item in subset_passes(run, template)}
    count = len(scoring_models(scorer_of(run)))
    counted = {
        "data": lambda: _data(run, "data"),
        "reference": lambda: _scoring(planner, "reference", work, 1, STORED_BYTES),
        "scores": lambda: _scoring(planner, "scores", work, count, STORED_BYTES + 4 * count),
        "reward": lambda: _reward(planner),
        "evaluation": lambda: _evaluation(
            planner, planner.work(sets.eval), run.done("data").facts["eval"], len(tried)
        ),
    }
    stages, found = list[StagePlan](), list[TrainingPlan]()
    for stage in wanted:
        if stage.name in subsets:
            stages.append(_subset(planner, subsets[stage.name]))
        if stage.name in counted:
            stages.append(counted[stage.name]())
        elif isinstance(stage, TrainingStage) and stage.present(run.recipe):
            planned = stage.planned(run, template)
            assert planned is not None
            found.append(planner.training(planned))
            stages.append(found[-1].stage)
    return stages, found


def _data(run: Run, name: str) -> StagePlan:
    files = [path for part in (name, "encoded") for path in run.path(part).rglob("*") if path.is_file()]
    return StagePlan(name, "done now", disk=sum(path.stat().st_size for path in files))


def _scoring(planner: Planner, name: str, work: np.ndarray, times: int, stored: float) -> StagePlan:
    time = planner.forward(work).times(times)
    words = f"{len(work)} prompts" + (f", {times} models" if times > 1 else "")
    if not times:
        return StagePlan(name, "no model: the scorer reads none", disk=stored * float(work[:, 1].sum()))
    return StagePlan(name, words, *planner.forward_bytes(), *time, disk=stored * float(work[:, 1].sum()))


def _subset(planner: Planner, item: SubsetPass) -> StagePlan:
    """The pass for an auxiliary model's subset, which is a part of the auxiliary model's stage."""
    found = _scoring(planner, f"{item.stage}{SUBSET}", planner.work(item.rows), len(item.models), 0)
    note = "the longest pairs stand for those that will be picked; the values that are read of them go with the training's end"
    return found._replace(note=note)


def _reward(planner: Planner) -> StagePlan:
    recipe = planner.run.recipe
    sizes = planner.sizes(recipe.reward.model or recipe.model.name)
    return StagePlan(
        "reward",
        "ranked lists",
        training_memory(sizes, Work(0, 0, 0), NumberTypes()).total,
        disk=FLOAT * sizes.weights,
        note="memory without activations; its time is not planned, a step costs about what one of the policy does",
    )


def _evaluation(planner: Planner, eval_rows: np.ndarray, prompts: int, batch: int) -> StagePlan:
    recipe = planner.run.recipe
    count = min(recipe.evaluation.prompts, prompts)
    judged_apart = 0 if recipe.eval_reward is None else 1
    time = planner.forward(eval_rows).times(2 + judged_apart)
    if batch:
        time = time.plus(planner.replies(2 * count / batch))
    memory, peak = planner.forward_bytes()
    # The start, the policy, and a copy that samples.
    copy = HALF if recipe.evaluation.precision == "bfloat16" else FLOAT
    more = planner.sizes(recipe.model.name).weights * (FLOAT + copy)
    return StagePlan(
        "evaluation",
        f"{len(eval_rows)} pairs, {count} prompts",
        memory + more,
        None if peak is None else peak + more,
        *time,
        note="replies at their full length; metrics, KL and the eval reward model's verdict are not in its time",
    )


def _online(run: Run, measure: bool) -> tuple[list[StagePlan], list[TrainingPlan]]:
    if run.recipe.examples is None:
        return _prompt_task(run), []
    first, *others = stages_of(run)
    first.carry_out(run)
    template = run.tokenizer_template(run.recipe.model.name)
    table = run.recipe.evaluation
    test = encoded_examples(run, template, "test", reply=table.max_new_tokens)
    tried = [context.prompt for context in test.contexts[: min(table.prompts, table.batch)]]
    trained = [stage for stage in others if isinstance(stage, TrainingStage) and stage.present(run.recipe)]
    items = [item for stage in trained if (item := stage.planned(run, template)) is not None]
    planner = Planner(run, items[-1].rows, tried, measure=measure)
    plans = [planner.training(item) for item in items]
    stages = [plan.stage for plan in plans]
    stages[-1] = _online_stage(planner, stages[-1])
    eval_rows = planner.work([row for row in test.rows if row.responses])
    last = _evaluation(planner, eval_rows, len(test.contexts), len(tried))
    return [_data(run, "examples"), *stages, last], plans


def _online_stage(planner: Planner, policy: StagePlan) -> StagePlan:
    """The policy's training, with the reward's state beside it."""
    recipe = planner.run.recipe
    sizes = planner.sizes(recipe.reward.model or recipe.model.name)
    state = training_memory(sizes, Work(0, 0, 0), NumberTypes()).total
    return policy._replace(
        memory=(policy.memory or 0.0) + state,
        peak=None if policy.peak is None else policy.peak + state,
        disk=(policy.disk or 0.0) + FLOAT * sizes.weights,
        note="its time is that of the policy's updates: samples, their ranking and learning the reward come on top; the "
        "reward's memory is counted, not measured",
    )


def _prompt_task(run: Run) -> list[StagePlan]:
    """What can be said of a prompt task: its texts, and the weights that it holds."""
    texts, recipe = labelled_parts(run), run.recipe
    assert recipe.prompt_task is not None
    planner = Planner(run, [], [], measure=False)
    names = (recipe.model.name, recipe.prompt_task.model or recipe.model.name)
    held = sum(FLOAT * planner.sizes(name).weights for name in names)
    reward = planner.sizes(recipe.reward.model or recipe.model.name)
    held += training_memory(reward, Work(0, 0, 0), NumberTypes()).total
    words = ", ".join(f"{len(found)} {part}" for part, found in texts._asdict().items())
    note = "memory of weights and the reward's state alone; the time depends on the task model's passes and is not planned"
    return [StagePlan("online", words, held, note=note)]


def _show(display: Display, plan: Plan, measure: bool) -> None:
    columns = ["stage", "work", "memory, counted", "time, counted", "disk"]
    if measure:
        columns[3:3] = ["memory, real step"]
        columns[5:5] = ["time, real step"]
    rows = [_row(stage, measure) for stage in plan.stages]
    total = Unit(0.0, 0.0)
    for stage in plan.stages:
        total = total.plus(Unit(stage.seconds or 0.0, stage.measured or 0.0))
    disk = sum(stage.disk or 0.0 for stage in plan.stages)
    sums = StagePlan(
        "together", seconds=total.counted, measured=total.measured if measure else None, disk=disk
    )
    display.table("plan", columns, [*rows, _row(sums, measure)])
    for stage in plan.stages:
        if stage.note:
            display.line(f"  {stage.stage}: {stage.note}")
    _show_memory(display, plan)


def _row(stage: StagePlan, measure: bool) -> list[str]:
    cells = [stage.stage, stage.work, size(stage.memory), clock(stage.seconds), size(stage.disk)]
    if measure:
        cells[3:3] = [size(stage.peak)]
        cells[5:5] = [clock(stage.measured)]
    return cells


def _show_memory(display: Display, plan: Plan) -> None:
    needed = max((max(stage.memory or 0.0, stage.peak or 0.0) for stage in plan.stages), default=0.0)
    if plan.free is not None:
        verdict = "enough" if needed < plan.free else "NOT enough"
        display.line(f"\n  free memory {size(plan.free)}; the largest stage wants {size(needed)}: {verdict}")
    if plan.smaller:
        ordered = sorted(plan.smaller, key=lambda item: item[1])
        rows = [
            (name.replace("training.", f"{_table_of(plan.largest)}.training."), size(held))
            for name, held in ordered
        ]
        display.table(f"what would make {plan.largest} smaller", ("--set", "memory, counted"), rows)


def size(count: float | None) -> str:
    """Bytes for people: ``1.4 GB``, in powers of 1000."""
    if count is None:
        return NOT_PLANNED
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def clock(seconds: float | None) -> str:
    """Seconds for people: ``12 s``, ``3 min``, ``1.5 h``."""
    if seconds is None:
        return NOT_PLANNED
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _table_of(stage: str) -> str:
    """The recipe's table of a stage: an auxiliary model's is one of several."""
    return stage.replace(AUXILIARY, "auxiliary_models.", 1) if stage.startswith(AUXILIARY) else stage
