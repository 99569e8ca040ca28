"""Checks for tables and keys that were written but that this kind of run never reads."""

from collections.abc import Iterator

from tokenward.config.base import Settings
from tokenward.config.online import OnlineTable
from tokenward.config.problems import Problem, refusal
from tokenward.config.schema import EvalTable, Recipe
from tokenward.config.source import LoadedRecipe

_COMPARISONS_ONLY = {
    "data": " Its prompts come from examples or prompt_task.",
    "oracle": "",
    "auxiliary_models": "",
    "scores.scorer": "",
    "scores.shard_rows": "",
    "reward.fraction": "",
    "policy": " Its objective, selection and training are in the online table.",
    "eval_reward": "",
}
"""Tables and keys that an online run does not read, and what it reads instead."""
_NOT_IN_PROMPT_TASK = {
    "fixed_prompts": "its policy writes prompts, which online.evaluate_every evaluates",
    "online.source": "the task model ranks the prompts by how well it classifies with them",
    "evaluation.metrics": "prompts are measured by the task model's accuracy",
    **{
        f"evaluation.{key}": "its evaluation generates no replies"
        for key in ("prompts", "max_new_tokens", "temperature", "top_p", "top_k", "precision", "batch")
    },
}


_WITH_A_REWARD = (
    "reward",
    *(
        f"online.{key}"
        for key in (
            "samples",
            "reward_steps",
            "reward_groups",
            "reward_evals",
            "reward_patience",
            "every",
            "until",
            "restart",
        )
    ),
)
"""Tables and keys that learn a reward, which an online run with ``online.reward`` does not."""


def check_unused(loaded: LoadedRecipe) -> None:
    """Refuse tables and keys that were written but have no effect.

    Raises:
        UserError: names every such table or key, with its line.
    """
    recipe = loaded.recipe
    unused = _in_comparisons(recipe) if recipe.online is None else _in_online(recipe)
    problems = [Problem(key, message, "unused-key") for key, message in unused]
    if problems:
        raise refusal(problems, loaded.lines.where)


def _in_comparisons(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for key in ("examples", "prompt_task"):
        if _written(recipe, key):
            yield (
                key,
                f"{key} is only read by an online run, and this recipe has no online table, so it would train on data. Add an "
                f"online table, or remove {key}.",
            )
    rows = recipe.data.eval
    if isinstance(rows, EvalTable) and rows.source is None and rows.split in (None, recipe.data.split):
        yield (
            "data.eval",
            "data.eval names neither a source nor another split, so it would be the training rows. Write for example eval: "
            "{split: test} or eval: {source: my_test.jsonl}.",
        )


def _in_online(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for key, instead in _COMPARISONS_ONLY.items():
        if _written(recipe, key):
            yield key, f"{key} is not read by an online run. Remove {key} or online.{instead}"
    if recipe.prompt_task is not None:
        for key, reason in _NOT_IN_PROMPT_TASK.items():
            if _written(recipe, key):
                yield key, f"{key} has no effect in a prompt_task: {reason}. Remove it."
    if recipe.online is not None and recipe.online.reward is not None:
        yield from _beside_a_reward(recipe, recipe.online)


def _beside_a_reward(recipe: Recipe, online: OnlineTable) -> Iterator[tuple[str, str]]:
    for key in _WITH_A_REWARD:
        if _written(recipe, key):
            yield (
                key,
                f"{key} has no effect with online.reward, which is learned already. Remove {key} or online.reward.",
            )
    if online.source is not None and online.evaluate_every is None:
        yield (
            "online.source",
            "online.source has no effect with online.reward unless the policy is evaluated during training. Set "
            "online.evaluate_every, or remove online.source.",
        )


def _written(recipe: Recipe, key: str) -> bool:
    """Whether the recipe sets a key; an empty table or list does not count."""
    value: object = recipe
    for part in key.split("."):
        if not isinstance(value, Settings) or part not in value.model_fields_set:
            return False
        value = getattr(value, part)
    return bool(value.model_fields_set) if isinstance(value, Settings) else value not in (None, [], {})
