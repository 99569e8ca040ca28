"""Settings that a recipe has and that this run does not read, because another setting makes them idle: said, not refused."""

from collections.abc import Iterator

from tokenward.config import GuidanceTable
from tokenward.pipeline.context import Run
from tokenward.pipeline.experts import is_needed, trained_experts
from tokenward.pipeline.guidance_stage import reads_reward
from tokenward.selection import selector_of

OF_THE_REWARD = (
    "samples",
    "reward_steps",
    "reward_groups",
    "reward_looks",
    "reward_patience",
    "every",
    "until",
    "restart",
)
"""Keys of ``guidance`` that say how its reward is learned."""

BESIDE = {"until": "every", "restart": "every", "evaluation_samples": "evaluate_every"}
"""Keys of ``guidance`` that act beside another alone."""


def idle_settings(run: Run, last: str) -> list[str]:
    """A line for each table or key that was written and is not read.

    Args:
        run: The run.
        last: The stage that it ends with, which is carried out whether it is read or not.
    """
    guidance = run.recipe.guidance
    return [*(_of_comparisons(run, last) if guidance is None else _of_guidance(run, guidance))]


def _of_comparisons(run: Run, last: str) -> Iterator[str]:
    recipe, scorer = run.recipe, run.recipe.scores.scorer.name
    for stage in ("oracle", "reward"):
        if stage in recipe.model_fields_set and stage != last and not is_needed(run, stage):
            yield f"the table {stage} is not read: the scorer {scorer} looks at no number of it"
    unread = [
        name for name, table in recipe.experts.items() if table.training and name not in trained_experts(run)
    ]
    for name in unread:
        yield f"the table experts.{name} is not read: the scorer {scorer} looks at no number of it"


def _of_guidance(run: Run, guidance: GuidanceTable) -> Iterator[str]:
    written, drawn = guidance.model_fields_set, guidance.objective.name == "reinforce"
    if "rollouts" in written and not drawn:
        yield f"guidance.rollouts is not read: the objective {guidance.objective.name} draws no replies to train on"
    if "selection" in written and drawn:
        yield "guidance.selection is not read: reinforce trains on every token of its own replies"
    if not reads_reward(guidance.objective.name, selector_of(guidance.selection, run.recipe.seed)):
        idle = [f"guidance.{key}" for key in OF_THE_REWARD if key in written]
        idle += ["the table reward"] if "reward" in run.recipe.model_fields_set else []
        for key in idle:
            yield f"{key} is not read: every token has weight 1, whatever a reward would say"
        return
    for key, other in BESIDE.items():
        if key in written and getattr(guidance, other) is None:
            yield f"guidance.{key} is not read: guidance.{other} is not written"
