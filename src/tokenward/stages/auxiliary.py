"""The scorers of a recipe, the models that they read, and where these models are."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tokenward.api.values import frozen_values
from tokenward.config import AuxiliaryModelTable, Named
from tokenward.errors import UserError
from tokenward.plugins import build, check_call
from tokenward.scoring.reads import IN_THE_STEP, TAKEN, is_online, reads_of
from tokenward.scoring.scorers import SCORERS, Scorer, check_in_the_step, check_scope, seeded
from tokenward.stages.run import AUXILIARY, Run, check_start
from tokenward.tokens.encode import PLACE


def scorer_of(run: Run) -> Scorer:
    """The scorer of the recipe's table ``scores``."""
    return made_scorer(run.recipe.scores.scorer, run.recipe.seed)


def made_scorer(table: Named, seed: int = 0) -> Scorer:
    """Build a scorer from a table of the recipe. A random scorer uses the recipe's seed unless it has its own.

    Raises:
        UserError: there is no such scorer, its settings are invalid, or it asks to see several responses at once.
    """
    arguments = seeded({"name": table.name, **table.arguments}, seed)
    del arguments["name"]
    scorer = build("scorer", table.name, arguments, SCORERS)
    check_call("scorer", table.name, scorer, ("record",))
    check_scope(scorer)
    return scorer


def subset_models(run: Run, model: str) -> list[str]:
    """The models that the subset of an auxiliary model reads, which must exist before it trains."""
    table = run.recipe.auxiliary_models.get(model)
    if table is None or table.subset is None:
        return []
    return list(dict.fromkeys(value.model for value in reads_of(made_scorer(table.subset.scorer))))


def models_read(run: Run) -> list[str]:
    """The models that the recipe's scorer reads, directly or through a subset, each after those that its subset reads."""
    found: list[str] = []
    entered: set[str] = set()

    def visit(model: str) -> None:
        if model not in entered:
            entered.add(model)
            for other in subset_models(run, model):
                visit(other)
            found.append(model)

    read = {value.model for value in frozen_values(scorer_of(run))}
    for model in (*TAKEN, *run.recipe.auxiliary_models):
        if model in read:
            visit(model)
    return found


def reads_model(run: Run, model: str) -> bool:
    """Whether a scorer of the run reads a model. A scorer that declares nothing reads the oracle."""
    return model in models_read(run)


def is_needed(run: Run, stage: str) -> bool:
    """Whether a stage makes something that is read; only the oracle and the reward can be unneeded."""
    return stage not in ("oracle", "reward") or reads_model(run, stage)


def trained_auxiliary(run: Run) -> list[str]:
    """The auxiliary models that are read and have a ``training`` table, in the order of their training."""
    auxiliary = run.recipe.auxiliary_models
    return [name for name in models_read(run) if name in auxiliary and auxiliary[name].training is not None]


def auxiliary_start(run: Run, name: str) -> str:
    """The model that an auxiliary model is, or is trained from."""
    own = run.recipe.auxiliary_models[name].model
    return run.whole(own) if own else run.reference_model


def folder_of(run: Run, model: str) -> str:
    """Folder or hub name of a model that scorers read: ``reference``, ``oracle``, ``reward`` or an auxiliary model."""
    if model == "reference":
        return run.reference_model
    if model not in run.recipe.auxiliary_models:
        return str(run.path(model) / "model")
    trained = run.recipe.auxiliary_models[model].training is not None
    return str(run.path(f"{AUXILIARY}{model}") / "model") if trained else auxiliary_start(run, model)


def auxiliary_of(run: Run, model: str) -> AuxiliaryModelTable:
    """The table of an auxiliary model; an empty table for other models."""
    return run.recipe.auxiliary_models.get(model, AuxiliaryModelTable())


def check_auxiliary(run: Run) -> dict[str, Callable[[], Any]]:
    """Checks of the auxiliary models' names and prompts, by recipe key."""
    checks: dict[str, Callable[[], Any]] = {}
    for name, table in run.recipe.auxiliary_models.items():
        key = f"auxiliary_models.{name}"
        checks[key] = partial(_check_name, name)
        checks[f"{key}.training"] = partial(_check_acts, name, table)
        checks[f"{key}.model"] = partial(_check_model, run, table.model, f"{key}.model")
        if table.prompt is not None:
            checks[f"{key}.prompt"] = partial(_check_prompt, table.prompt, f"{key}.prompt")
    return checks


def _check_name(name: str) -> None:
    if name in TAKEN or not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]{0,59}", name):
        raise UserError(
            f"an auxiliary model cannot be called {name!r:.80}: {', '.join(TAKEN)} are reserved, and a name has at most 60 letters, digits and hyphens. "
            "Use for example better.",
            code="bad-name",
            key=f"auxiliary_models.{name}",
        )


def _check_acts(name: str, table: AuxiliaryModelTable) -> None:
    """Refuse an auxiliary model that equals the reference, or has keys that act only in training."""
    key = f"auxiliary_models.{name}"
    idle = sorted(table.model_fields_set & {"objective", "swap_labels", "fraction", "subset", "adapter"})
    if table.training is None and idle:
        raise UserError(
            f"the auxiliary model {name} has {', '.join(idle)} and no training, so these keys do nothing. Add training: {{...}} with "
            "fields of transformers.TrainingArguments, or leave them out.",
            code="idle-key",
            key=key,
        )
    if table.training is None and table.model is None and table.prompt is None:
        raise UserError(
            f"the auxiliary model {name} is the reference itself: it has no model, no prompt and no training. Add one of them.",
            code="idle-table",
            key=key,
        )


def _check_model(run: Run, model: str | None, key: str) -> None:
    if model is None:
        return
    if model in run.recipe.auxiliary_models and not Path(model).is_dir():
        raise UserError(
            f"model is {model!r}, the name of another auxiliary model, and an auxiliary model cannot start from another one of the same "
            "run. Give a folder or a hub name, such as the folder auxiliary-NAME/model of another run.",
            code="model-of-same-run",
            key=key,
        )
    check_start(model, trust_remote_code=run.recipe.model.trust_remote_code)


def _check_prompt(text: str, key: str) -> None:
    if PLACE not in text:
        raise UserError(
            f"the prompt is {text!r} and does not contain {PLACE}, so it would be the same for all rows. Put {PLACE} where the user's "
            "own text belongs.",
            code="missing-placeholder",
            key=key,
        )


def check_reads(run: Run, scorer: Scorer) -> None:
    """Refuse a scorer that reads a model or a value that the run does not have.

    Raises:
        UserError: names what there is.
    """
    known = ("policy", "reference", "oracle", "reward", "data", *run.recipe.auxiliary_models)
    for value in reads_of(scorer):
        if value.model not in known:
            raise UserError(
                f"the scorer reads {value}, and there is no model {value.model!r}. There are {', '.join(known[:3])} and the recipe's "
                f"auxiliary_models ({', '.join(run.recipe.auxiliary_models) or 'none'}). Add a table to auxiliary_models.",
                code="unknown-model",
                key="auxiliary_models",
            )
        if value.online and value.kind not in IN_THE_STEP:
            raise UserError(
                f"the scorer reads {value}; during training only {', '.join(IN_THE_STEP)} of the policy are available. Read it from the "
                "reference or from an auxiliary model.",
                code="not-online",
                key="scores.scorer",
            )
    if is_online(scorer):
        check_in_the_step(scorer)
