"""``tokenward plan RECIPE``: the memory, time and disk space of each stage, before the run starts."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokenward.display import Display
from tokenward.models.loading import device_of
from tokenward.ops.costs import FLOAT, HALF, NumberTypes, Work, training_memory
from tokenward.stages.auxiliary import made_scorer, scorer_of
from tokenward.stages.base import TrainingStage
from tokenward.stages.checks import check_models
from tokenward.stages.lists import check_data, stages_of, wanted_stages
from tokenward.stages.policy import on_own_replies
from tokenward.stages.run import AUXILIARY, Run
from tokenward.stages.scores import scoring_models
from tokenward.stages.subset import looked_at
from tokenward.stages.tables import Tables, tables
from tokenward.stages.tasks import encoded_examples, labelled_parts
from tokenward.tokens.encode import check_some_left
from tokenward.tools.plan_devices import DevicePlan, Wanted
from tokenward.tools.plan_measure import free_memory
from tokenward.tools.plan_stages import Planner, StagePlan
from tokenward.tools.plan_words import clock, size
from tokenward.tools.run import open_run

STORED_BYTES = 16
"""Bytes per token in the score store before compression: id, start, end, one value."""


class Plan(NamedTuple):
    """The planned stages of a recipe, and the free bytes of this machine, if known.

    ``largest`` is the training that needs the most memory, and ``smaller`` are settings that would lower its memory, each
    with the estimated bytes. ``devices`` has the stages on the devices that were asked for.
    """

    stages: list[StagePlan]
    largest: str
    smaller: list[tuple[str, float]]
    free: float | None
    devices: list[DevicePlan]


def plan_recipe(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    measure: bool = True,
    quiet: bool = False,
    devices: Wanted | None = None,
) -> Plan:
    """Plan a recipe and show the plan. This runs the data stage, because every estimate needs the lengths of its texts.

    With ``measure``, each training runs one real step on its longest rows. Otherwise everything is estimated. With ``devices``,
    the plan also says what each of them would need; nothing of that is measured.

    Raises:
        UserError: the recipe or the data cannot work.
    """
    run = open_run(recipe, overrides, quiet=quiet)
    check_models(run)
    smaller: dict[str, list[tuple[str, float]]] = {}
    if run.recipe.online is None:
        stages, planner = _plan_offline(run, smaller, measure)
    elif run.recipe.examples is None:
        stages, planner = _plan_prompt_task(run)
    else:
        stages, planner = _plan_online(run, smaller, measure)
    trained = [stage for stage in stages if stage.stage in smaller]
    largest = max(trained, key=lambda stage: stage.memory or 0.0).stage if trained else ""
    free = free_memory(device_of(run.recipe.model.device))
    found = [] if devices is None else planner.on_devices(devices, [stage.stage for stage in stages])
    plan = Plan(stages, largest, smaller.get(largest, []), free, found)
    _show(run.display, plan, measure)
    if devices is not None:
        show_devices(run.display, found, devices)
    return plan


def _plan_offline(
    run: Run, smaller: dict[str, list[tuple[str, float]]], measure: bool
) -> tuple[list[StagePlan], Planner]:
    wanted = wanted_stages(run)
    wanted[0].carry_out(run)
    check_data(run, wanted)
    template = run.tokenizer_template(run.recipe.model.name)
    sets = tables(run, template)
    check_some_left(sets.summed)
    table = run.recipe.evaluation
    prompts = [row.prompt for row in sets.eval.by_prompt()[: min(table.prompts, table.batch)]]
    planner = Planner(run, sets.train.then(sets.eval_reward).by_prompt(), prompts, measure=measure)
    everything, models = planner.work(sets.everything), len(scoring_models(scorer_of(run)))
    stored = STORED_BYTES + 4 * models
    planners = {
        "data": lambda: _plan_data(run, "data"),
        "reference": lambda: _plan_scoring(planner, "reference", everything, 1, STORED_BYTES),
        "scores": lambda: _plan_scoring(planner, "scores", everything, models, stored),
        "reward": lambda: _plan_reward(planner),
        "evaluation": lambda: _plan_evaluation(
            planner, planner.work(sets.eval), run.done("data").facts["eval"], len(prompts)
        ),
    }
    stages: list[StagePlan] = []
    for stage in wanted:
        stages += _plan_subset(planner, sets, stage.name)
        if stage.name in planners:
            stages.append(planners[stage.name]())
        elif isinstance(stage, TrainingStage) and stage.present(run.recipe):
            item = stage.planned(run, template)
            assert item is not None
            plan, smaller[stage.name] = planner.training(item)
            own = stage.name == "policy" and on_own_replies(run)
            stages.append(plan._replace(note=_OWN_REPLIES) if own else plan)
    return stages, planner


_OWN_REPLIES = (
    "time of the updates only, without sampling the replies; memory without the models that give the rewards"
)


def _plan_data(run: Run, name: str) -> StagePlan:
    files = [path for part in (name, "encoded") for path in run.path(part).rglob("*") if path.is_file()]
    return StagePlan(name, "done now", disk=sum(path.stat().st_size for path in files))


def _plan_scoring(
    planner: Planner, name: str, work: np.ndarray, models: int, bytes_per_token: float
) -> StagePlan:
    disk = bytes_per_token * float(work[:, 1].sum())
    if not models:
        return StagePlan(name, "no model needed", disk=disk)
    words = f"{len(work)} prompts" + (f", {models} models" if models > 1 else "")
    plan = StagePlan(name, words, *planner.forward_bytes(), disk=disk)
    planner.note_scoring(name, work, models)
    return plan.with_time(planner.forward(work) * models)


def _plan_subset(planner: Planner, sets: Tables, stage: str) -> list[StagePlan]:
    """The pass that selects an auxiliary model's subset; it belongs to the stage of that model."""
    table = planner.run.recipe.auxiliary_models.get(stage.removeprefix(AUXILIARY))
    if not stage.startswith(AUXILIARY) or table is None or table.subset is None:
        return []
    rows = looked_at(sets.part("train"), table.subset).by_prompt()
    models = scoring_models(made_scorer(table.subset.scorer))
    plan = _plan_scoring(planner, f"{stage}, subset", planner.work(rows), len(models), 0)
    note = "planned with the longest pairs, because the subset is not known yet; its values are deleted after the training"
    return [plan._replace(note=note)]


def _reward_bytes(planner: Planner) -> tuple[float, float]:
    """Memory of a token reward model in training, without activations, and its size on disk."""
    recipe = planner.run.recipe
    sizes = planner.sizes(recipe.reward.model or recipe.model.name)
    return training_memory(sizes, Work(0, 0, 0), NumberTypes()).total, FLOAT * sizes.weights


def _plan_reward(planner: Planner) -> StagePlan:
    note = "memory without activations; the time is not planned, but a step takes about as long as one of the policy"
    memory, disk = _reward_bytes(planner)
    return StagePlan("reward", "ranked lists", memory, disk=disk, note=note)


def _plan_evaluation(planner: Planner, eval_rows: np.ndarray, prompts: int, batch: int) -> StagePlan:
    recipe = planner.run.recipe
    count = min(recipe.evaluation.prompts, prompts)
    # The start and the policy read every pair, and so does the eval reward model if there is one.
    time = planner.forward(eval_rows) * (2 if recipe.eval_reward is None else 3)
    if batch:
        time = time + planner.replies(2 * count / batch)
    memory, peak = planner.forward_bytes()
    # The start, the policy, and a copy of it for sampling are in memory together.
    copy = HALF if recipe.evaluation.precision == "bfloat16" else FLOAT
    more = planner.sizes(recipe.model.name).weights * (FLOAT + copy)
    return StagePlan(
        "evaluation",
        f"{len(eval_rows)} pairs, {count} prompts",
        memory + more,
        None if peak is None else peak + more,
        note="time with replies of full length, without metrics, KL and the scores of the eval reward model",
    ).with_time(time)


def _plan_online(
    run: Run, smaller: dict[str, list[tuple[str, float]]], measure: bool
) -> tuple[list[StagePlan], Planner]:
    first, *others = stages_of(run)
    first.carry_out(run)
    template = run.tokenizer_template(run.recipe.model.name)
    table = run.recipe.evaluation
    test = encoded_examples(run, template, "test", reply=table.max_new_tokens)
    prompts = [context.prompt for context in test.contexts[: min(table.prompts, table.batch)]]
    trained = [stage for stage in others if isinstance(stage, TrainingStage) and stage.present(run.recipe)]
    items = [item for stage in trained if (item := stage.planned(run, template)) is not None]
    planner = Planner(run, items[-1].rows, prompts, measure=measure)
    stages = [_plan_data(run, "examples")]
    for item in items:
        plan, smaller[item.stage] = planner.training(item)
        stages.append(plan)
    stages[-1] = _with_reward(planner, stages[-1])
    eval_rows = planner.work([row for row in test.rows if row.responses])
    return [*stages, _plan_evaluation(planner, eval_rows, len(test.contexts), len(prompts))], planner


def _with_reward(planner: Planner, policy: StagePlan) -> StagePlan:
    """The online training of the policy, with the reward model in memory too."""
    memory, disk = _reward_bytes(planner)
    return policy._replace(
        memory=(policy.memory or 0.0) + memory,
        peak=None if policy.peak is None else policy.peak + memory,
        disk=(policy.disk or 0.0) + disk,
        note="time of the policy's updates only, without sampling, ranking and learning the reward; "
        "the memory of the reward is always estimated",
    )


def _plan_prompt_task(run: Run) -> tuple[list[StagePlan], Planner]:
    """A prompt task can be planned only as far as its texts and its weights."""
    texts, recipe = labelled_parts(run), run.recipe
    assert recipe.prompt_task is not None
    planner = Planner(run, [], [], measure=False)
    names = (recipe.model.name, recipe.prompt_task.model or recipe.model.name)
    memory = sum(FLOAT * planner.sizes(name).weights for name in names) + _reward_bytes(planner)[0]
    words = ", ".join(f"{len(found)} {part}" for part, found in texts._asdict().items())
    note = "memory of the weights and of the reward's training only; the time depends on the task model and is not planned"
    return [StagePlan("online", words, memory, note=note)], planner


def _show(display: Display, plan: Plan, measure: bool) -> None:
    columns = ["stage", "work", "memory, estimated", "time, estimated", "disk"]
    if measure:
        columns[3:4] = ["memory, measured", "time, estimated", "time, measured"]
    seconds, measured, disk = (
        sum(getattr(stage, name) or 0.0 for stage in plan.stages) for name in ("seconds", "measured", "disk")
    )
    total = StagePlan("total", seconds=seconds, measured=measured, disk=disk)
    display.table("plan", columns, [_row(stage, measure) for stage in (*plan.stages, total)])
    for stage in plan.stages:
        if stage.note:
            display.line(f"  {stage.stage}: {stage.note}")
    needed = max((max(stage.memory or 0.0, stage.peak or 0.0) for stage in plan.stages), default=0.0)
    if plan.free is not None:
        verdict = "enough" if needed < plan.free else "NOT enough"
        display.line(f"\n  free memory {size(plan.free)}, the largest stage needs {size(needed)}: {verdict}")
    if plan.smaller:
        rows = [(name, size(held)) for name, held in sorted(plan.smaller, key=lambda item: item[1])]
        display.table(
            f"settings that lower the memory of {plan.largest}", ("--set", "memory, estimated"), rows
        )


DEVICE_COLUMNS = (
    "weights",
    "gradients",
    "moments",
    "activations",
    "head tile",
    "reference",
    "whole",
    "in all",
)


def device_cells(plan: DevicePlan) -> list[str]:
    """The bytes and the time of a stage on several devices as cells of a table."""
    return [
        *(size(part) if part else "-" for part in plan.memory),
        size(plan.memory.total),
        clock(plan.seconds),
    ]


def show_devices(display: Display, plans: Sequence[DevicePlan], wanted: Wanted) -> None:
    """Show what each of several devices would need, and what was assumed."""
    of = "" if wanted.memory is None else f" of {size(wanted.memory)}"
    rows = [[plan.stage, *device_cells(plan)] for plan in plans]
    display.table(f"each of {wanted.count} devices{of}, computed", ("stage", *DEVICE_COLUMNS, "time"), rows)
    for plan in plans:
        if plan.advice:
            display.line(f"  {plan.stage} {plan.advice}")
    display.line(f"  {assumptions(wanted)}")


def assumptions(wanted: Wanted) -> str:
    """What a plan of several devices takes for granted."""
    rate = (
        "400 TFLOP/s in bfloat16 and 50 in float32 a device (assumed: an H100 at 40 % and 75 % of its peaks)"
        if wanted.rate is None
        else f"{wanted.rate / 1e12:g} TFLOP/s a device (as given)"
    )
    link = wanted.devices(NumberTypes(), {}).link / 1e9
    given = "assumed" if wanted.link is None else "as given"
    return (
        f"nothing of this table was measured: it is counted from sizes, for {rate}, and {link:g} GB/s sent ({given}), with sending "
        "hidden behind computing as far as it can be. A device's libraries take one or two GB more"
    )


def _row(stage: StagePlan, measure: bool) -> list[str]:
    memory, time = [size(stage.memory)], [clock(stage.seconds)]
    if measure:
        memory, time = [*memory, size(stage.peak)], [*time, clock(stage.measured)]
    return [stage.stage, stage.work, *memory, *time, size(stage.disk)]
