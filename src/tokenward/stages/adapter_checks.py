"""The adapters of a recipe: tried on a model of the same shape without weights, before anything runs."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from tokenward.config import Recipe
from tokenward.errors import UserError
from tokenward.models.sizes import model_sizes


class Use(NamedTuple):
    """A stage that trains an adapter.

    Attributes:
        stage: Its table's key.
        key: Where its adapter is written.
        adapter: Fields of ``peft.LoraConfig``.
        model: What it starts from, or a model of the same shape.
        training: Its ``training`` table.
    """

    stage: str
    key: str
    adapter: dict[str, Any]
    model: str
    training: dict[str, Any]


def adapter_checks(recipe: Recipe) -> dict[str, Callable[[], None]]:
    """A check for each adapter that is written, by its key."""
    found: dict[str, list[Use]] = {}
    for use in _uses(recipe):
        found.setdefault(use.key, []).append(use)
    trust = recipe.model.trust_remote_code
    return {key: partial(_check, uses, trust) for key, uses in found.items()}


def _uses(recipe: Recipe) -> list[Use]:
    shared, name = recipe.model.adapter, recipe.model.name
    oracle = recipe.oracle.model or name
    stages: list[tuple[str, Any, str, dict[str, Any]]] = []
    if recipe.online is not None:
        stages.append(("online", "inherit", name, recipe.online.training))
    else:
        stages.append(("policy", "inherit", recipe.policy.model or name, recipe.policy.training))
        stages.append(("oracle", recipe.oracle.adapter, oracle, recipe.oracle.training))
        for own, table in recipe.auxiliary_models.items():
            if table.training is not None:
                stages.append(
                    (f"auxiliary_models.{own}", table.adapter, table.model or oracle, table.training)
                )
    if recipe.online is None and recipe.eval_reward is not None:
        stages.append(("eval_reward", "inherit", oracle, recipe.eval_reward.training))
    uses = []
    for stage, own, model, training in stages:
        key, adapter = ("model.adapter", shared) if own == "inherit" else (f"{stage}.adapter", own)
        uses += [Use(stage, key, adapter, model, training)] if adapter is not None else []
    return uses


def _check(uses: list[Use], trust_remote_code: bool) -> None:
    for use in uses:
        dropout = use.adapter.get("lora_dropout")
        if dropout and use.training.get("disable_dropout", True):
            raise UserError(
                f"lora_dropout is {dropout}, and {use.stage}.training.disable_dropout, which is true unless it is written, sets every "
                f"dropout to 0. Leave lora_dropout out, or write {use.stage}.training.disable_dropout: false."
            )
    for model in dict.fromkeys(use.model for use in uses):
        model_sizes(model, adapter=uses[0].adapter, trust_remote_code=trust_remote_code)
