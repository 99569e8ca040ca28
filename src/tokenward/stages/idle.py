"""Settings that a recipe has and that this run does not read, because another setting makes them idle: said, not refused."""

from collections.abc import Iterator

from tokenward.config import OnlineTable
from tokenward.selection import selector_of
from tokenward.stages.auxiliary import is_needed, trained_auxiliary
from tokenward.stages.online import reads_reward
from tokenward.stages.run import Run

OF_THE_REWARD = (
    "samples",
    "reward_steps",
    "reward_groups",
    "reward_evals",
    "reward_patience",
    "every",
    "until",
    "restart",
)
"""Keys of ``online`` that say how its reward is learned."""

BESIDE = {"until": "every", "restart": "every", "evaluation_samples": "evaluate_every"}
"""Keys of ``online`` that act beside another alone."""


def idle_settings(run: Run, last: str) -> list[str]:
    """A line for each table or key that was written and is not read.

    Args:
        run: The run.
        last: The stage that it ends with, which is carried out whether it is read or not.
    """
    online = run.recipe.online
    return [*(_of_comparisons(run, last) if online is None else _of_online(run, online))]


def _of_comparisons(run: Run, last: str) -> Iterator[str]:
    recipe, scorer = run.recipe, run.recipe.scores.scorer.name
    for stage in ("oracle", "reward"):
        if stage in recipe.model_fields_set and stage != last and not is_needed(run, stage):
            yield f"the table {stage} is not read: the scorer {scorer} looks at no number of it"
    unread = [
        name
        for name, table in recipe.auxiliary_models.items()
        if table.training and name not in trained_auxiliary(run)
    ]
    for name in unread:
        yield f"the table auxiliary_models.{name} is not read: the scorer {scorer} looks at no number of it"


def _of_online(run: Run, online: OnlineTable) -> Iterator[str]:
    written, drawn = online.model_fields_set, online.objective.name == "reinforce"
    if "rollouts" in written and not drawn:
        yield f"online.rollouts is not read: the objective {online.objective.name} draws no replies to train on"
    if "selection" in written and drawn:
        yield "online.selection is not read: reinforce trains on every token of its own replies"
    if not reads_reward(online.objective.name, selector_of(online.selection, run.recipe.seed)):
        idle = [f"online.{key}" for key in OF_THE_REWARD if key in written]
        idle += ["the table reward"] if "reward" in run.recipe.model_fields_set else []
        for key in idle:
            yield f"{key} is not read: every token has weight 1, whatever a reward would say"
        return
    for key, other in BESIDE.items():
        if key in written and getattr(online, other) is None:
            yield f"online.{key} is not read: online.{other} is not written"
