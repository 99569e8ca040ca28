"""Checks of the types of arguments, before a model is loaded for them."""

from collections.abc import Mapping
from inspect import isclass
from typing import Any

from datasets import Dataset
from torch import nn

from tokenward.api.inputs import TokenSettings, check_rows_type
from tokenward.errors import UserError
from tokenward.models.base import shares_weights
from tokenward.models.loading import LanguageModel
from tokenward.models.reward import RewardModel
from tokenward.objectives import (
    OBJECTIVES,
    CheckedObjective,
    Objective,
    Reinforce,
    Selected,
    custom_objective,
)
from tokenward.plugins import check_call, described, name_of
from tokenward.sampling.server import ServerSampler
from tokenward.sampling.vllm import VllmSampler
from tokenward.scoring.scorers import SCORERS
from tokenward.scoring.texts import TokenScorer
from tokenward.selection import SELECTORS, Selector


def checked_objective(objective: Any) -> Objective:
    """The objective; the results of a custom one are checked, as in a run of a recipe.

    Raises:
        UserError: it is not an objective, or reads what it does not declare.
    """
    _check_instance("objective", objective, OBJECTIVES, "DPO()")
    if type(objective) in OBJECTIVES.values() or isinstance(objective, CheckedObjective | Selected):
        return objective
    return custom_objective("objective", name_of(objective), objective)


def check_of_data(objective: Objective) -> None:
    """Check that an objective trains on replies of a data set.

    Raises:
        UserError: It trains on replies that the policy writes.
    """
    if isinstance(objective, Reinforce):
        raise UserError(
            "Reinforce trains on replies that the policy writes at every step, and this trainer has those of the data, which would give "
            "another gradient than the policy's. Use ReinforceTrainer, or WeightedLikelihood() for replies of the data.",
            code="own-replies",
        )


def check_selector(selector: Selector | None) -> None:
    """Check that a selector can be called with scored tokens.

    Raises:
        UserError: it cannot.
    """
    if selector is None:
        return
    number = selector if isinstance(selector, float) and 0 < selector <= 1 else 0.3
    _check_instance("selector", selector, SELECTORS, f"TopFraction({number})")
    check_call("selector", name_of(selector), selector, ("tokens",))


def check_scoring(oracle: Any, scorer: Any) -> None:
    """Check that no class or name is given in place of a scorer, and that there is only one scorer.

    Raises:
        UserError: it is.
    """
    if isclass(oracle):
        _check_instance("oracle", oracle, SCORERS, "Surprisal()")
    if scorer is None:
        return
    _check_instance("scorer", scorer, SCORERS, "LogRatio()")
    if callable(oracle) and not isinstance(oracle, nn.Module | LanguageModel | RewardModel | TokenScorer):
        raise UserError(
            f"oracle is the scorer {name_of(oracle)}, and scorer is {name_of(scorer)}. Pass one of them only, or a trained model as "
            "oracle.",
            code="two-scorers",
        )


def check_tokens(tokens: Any) -> None:
    """Check that the settings are a :class:`TokenSettings`."""
    if not isinstance(tokens, TokenSettings):
        given = (
            ", ".join(f"{key}={value!r}" for key, value in tokens.items()) if isinstance(tokens, dict) else ""
        )
        raise UserError(
            f"tokens is {described(tokens)}. Pass tokenward.TokenSettings({given}).", code="wrong-type"
        )


def check_scored(scored: Any) -> None:
    """Check that a scored data set is a ``Dataset``."""
    check_rows_type(scored, "scored")
    if not isinstance(scored, Dataset):
        raise UserError(
            f"scored is {described(scored)}. Pass the data set that tokenward.score returned.",
            code="wrong-type",
        )


def check_metrics(metrics: Any, prompts: Any) -> None:
    """Check the metrics of sampled replies, and the number of prompts.

    Raises:
        UserError: metrics is no list of names, or prompts no number, or there are metrics and no prompts.
    """
    if isinstance(metrics, str):
        raise UserError(f'metrics is {metrics!r}, a str. Pass a list: ["{metrics}"].', code="wrong-type")
    if not isinstance(metrics, list | tuple):
        raise UserError(
            f'metrics is {described(metrics)}. Pass a list of names, such as ["length"].', code="wrong-type"
        )
    for metric in metrics:
        if not isinstance(metric, str):
            raise UserError(
                f'metrics contains {described(metric)}. Pass names; a custom metric is named "module:function".',
                code="wrong-type",
            )
    if not isinstance(prompts, int):
        raise UserError(f"prompts is {prompts!r}, {described(prompts)}. Pass a number.", code="wrong-type")
    if metrics and not prompts:
        raise UserError(
            "metrics are computed on sampled replies, and prompts is 0. Pass for example prompts=64, or leave metrics out.",
            code="metrics-without-prompts",
        )


def _check_instance(name: str, value: Any, known: Mapping[str, type], example: str) -> None:
    """Refuse a class, a name or a number in place of an object.

    Args:
        name: Name of the argument.
        value: The argument.
        known: The built-in classes by their name in recipes.
        example: What to pass instead.
    """
    if isclass(value):
        raise UserError(
            f"{name} is the class {value.__name__}. Pass an instance, such as {value.__name__}().",
            code="wrong-type",
        )
    if isinstance(value, str) and value in known:
        example = f"{known[value].__name__}()"
    if value is None or isinstance(value, str | int | float | dict | list | tuple):
        shown = "None" if value is None else f"{value!r:.80}, {described(value)}"
        article = "an" if name[0] in "aeiou" else "a"
        raise UserError(f"{name} is {shown}. Pass {article} {name}, such as {example}.", code="wrong-type")


def check_sampler(sampler: Any, prompts: int) -> None:
    """Refuse what is no sampler, and a sampler without prompts."""
    if sampler is None:
        return
    if not isinstance(sampler, ServerSampler | VllmSampler):
        raise UserError(
            f"sampler is {described(sampler)}. Pass ServerSampler(address=...) or VllmSampler(), or leave it out to sample with "
            "transformers.",
            code="wrong-type",
        )
    if not prompts:
        raise UserError(
            "a sampler has no effect without replies. Pass prompts, the number of prompts to reply to.",
            code="unused-key",
        )


def check_comparable(
    start: LanguageModel, policy: LanguageModel, tokens: TokenSettings, *, same_name: bool
) -> None:
    """Refuse one model for both, and models that read other tokens."""
    same_files = start.fingerprint != "" and start.fingerprint == policy.fingerprint
    if same_name or same_files or shares_weights(start, policy):
        raise UserError(
            "model and reference are the same model, so there is no change to measure. Pass the model before training as reference.",
            code="same-model",
        )
    if policy.template(tokens.style).fingerprint != start.template(tokens.style).fingerprint:
        raise UserError(
            f"model {policy.name} has another tokenizer or chat template than reference {start.name}, so their log-probabilities "
            "cannot be compared. Pass the model before training as reference, or the tokenizer of both as processing_class.",
            code="tokenizer-mismatch",
        )
