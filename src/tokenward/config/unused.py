"""Tables and keys that were written but that the recipe's kind of run never reads."""

from collections.abc import Iterator

from tokenward.config.base import Table
from tokenward.config.problems import Problem
from tokenward.config.schema import DataTable, EvalTable, Recipe
from tokenward.config.source import LoadedRecipe
from tokenward.errors import UserError

_COMPARISONS_ONLY = (
    "data",
    "oracle",
    "auxiliary_models",
    "scores.scorer",
    "scores.shard_rows",
    "reward.fraction",
    "policy",
    "eval_reward",
)
_INSTEAD = {
    "data": "Its prompts are in the table examples, or prompt_task.",
    "policy": "Its objective, selection and training are in the table online.",
}
_NOT_IN_PROMPT_TASK = {
    "fixed_prompts": "its policy writes prompts, which the looks at it (online.evaluate_every) judge",
    "online.source": "prompts are ranked by how well the task model classifies with them",
    "evaluation.metrics": "prompts are judged by the task model's accuracy",
    **{
        f"evaluation.{key}": "no replies are drawn to judge it by"
        for key in ("prompts", "max_new_tokens", "temperature", "top_p", "top_k", "precision", "batch")
    },
}


def check_unused(loaded: LoadedRecipe) -> None:
    """Refuse what was written and cannot act.

    Raises:
        UserError: for every such table or key, with its line.
    """
    problems = [*_unused(loaded.recipe)]
    if problems:
        raise UserError("\n".join(f"{loaded.lines.where(key)}: {message}" for key, message in problems))


def _unused(recipe: Recipe) -> Iterator[Problem]:
    if recipe.online is None:
        for key in filter(lambda key: _written(recipe, key), ("examples", "prompt_task")):
            yield Problem(
                key,
                f"{key} is read by an online run alone, and this recipe has no table online: it would train on the "
                f"comparisons of data. Write a table online, or leave {key} out.",
            )
        yield from _eval(recipe.data)
        return
    for key in filter(lambda key: _written(recipe, key), _COMPARISONS_ONLY):
        instead = _INSTEAD.get(key, "")
        yield Problem(
            key,
            f"{key} belongs to a run on comparisons, and the table online makes this run an online one, which does not "
            f"read it. Leave {key} or online out.{f' {instead}' if instead else ''}",
        )
    if recipe.prompt_task is not None:
        for key, reason in _NOT_IN_PROMPT_TASK.items():
            if _written(recipe, key):
                yield Problem(key, f"{key} cannot act in a prompt_task: {reason}. Leave it out.")


def _eval(data: DataTable) -> Iterator[Problem]:
    """Evaluation rows must not be the training rows."""
    if not isinstance(data.eval, EvalTable):
        return
    if data.eval.source is None and data.eval.split in (None, data.split):
        yield Problem(
            "data.eval",
            "data.eval names neither a source nor another split, so it would be the training rows. Write for example "
            "eval: {split: test}, or eval: {source: my_test.jsonl}.",
        )


def _written(recipe: Recipe, key: str) -> bool:
    """Whether a recipe says something there; an emptied table or list says nothing."""
    value: object = recipe
    for part in key.split("."):
        if not isinstance(value, Table) or part not in value.model_fields_set:
            return False
        value = getattr(value, part)
    return bool(value.model_fields_set) if isinstance(value, Table) else value not in (None, [], {})
