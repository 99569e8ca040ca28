"""The scorers of a recipe, which models they read, and where those models are."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tokenward.config import AuxiliaryModelTable, Named
from tokenward.errors import UserError
from tokenward.plugins import build, check_call
from tokenward.scoring.reads import IN_THE_STEP, TAKEN, Value, is_online, reads_of
from tokenward.scoring.scorers import SCORERS, Scorer, check_in_the_step, check_scope, seeded
from tokenward.stages.run import AUXILIARY, Run, check_start
from tokenward.tokens.encode import PLACE


def scorer_of(run: Run) -> Scorer:
    """The scorer that the recipe names for the scores."""
    return made_scorer(run.recipe.scores.scorer, run.recipe.seed)


def made_scorer(table: Named, seed: int = 0) -> Scorer:
    """The scorer that a table of a recipe names. One that draws has the recipe's seed unless it has its own.

    Raises:
        UserError: there is none, its settings are wrong, or it says that it must see several responses at once.
    """
    arguments = seeded({"name": table.name, **table.arguments}, seed)
    del arguments["name"]
    scorer = build("scorer", table.name, arguments, SCORERS)
    check_call("scorer", table.name, scorer, ("record",))
    check_scope(scorer)
    return scorer


def frozen_values(scorer: Scorer) -> list[Value]:
    """What a scorer reads of frozen models and of the data; what it reads of the policy is not among it."""
    return [value for value in dict.fromkeys(reads_of(scorer)) if not value.online]


def picking_models(run: Run, model: str) -> list[str]:
    """Models that an auxiliary model's subset read, so that they must be there before it trains; of another model none."""
    table = run.recipe.auxiliary_models.get(model)
    if table is None or table.subset is None:
        return []
    return list(dict.fromkeys(value.model for value in reads_of(made_scorer(table.subset.scorer))))


def models_read(run: Run) -> list[str]:
    """Models that the recipe's scorer reads, itself or through subset, each after those that its own subset read."""
    found: list[str] = []
    entered: set[str] = set()

    def visit(model: str) -> None:
        if model not in entered:
            entered.add(model)
            for other in picking_models(run, model):
                visit(other)
            found.append(model)

    read = {value.model for value in frozen_values(scorer_of(run))}
    for model in (*TAKEN, *run.recipe.auxiliary_models):
        if model in read:
            visit(model)
    return found


def reads_model(run: Run, model: str) -> bool:
    """Whether a scorer, of the scores or of subset, reads a model; one that does not say what it reads, reads the oracle."""
    return model in models_read(run)


def is_needed(run: Run, stage: str) -> bool:
    """Whether a stage makes something that a scorer reads; stages that no scorer reads from are always needed."""
    return stage not in ("oracle", "reward") or reads_model(run, stage)


def trained_auxiliary(run: Run) -> list[str]:
    """Auxiliary models that are trained in this run, in the order of their training: those with a ``training`` table that are read."""
    auxiliary = run.recipe.auxiliary_models
    return [name for name in models_read(run) if name in auxiliary and auxiliary[name].training is not None]


def auxiliary_start(run: Run, name: str) -> str:
    """The model that an auxiliary model is, or that it is trained from."""
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
    """An auxiliary model's table; of another model one that changes nothing."""
    return run.recipe.auxiliary_models.get(model, AuxiliaryModelTable())


def check_auxiliary(run: Run) -> dict[str, Callable[[], Any]]:
    """Checks of the auxiliary models' names and prompts, by the key that each is about."""
    checks: dict[str, Callable[[], Any]] = {}
    for name, table in run.recipe.auxiliary_models.items():
        checks[f"auxiliary_models.{name}"] = _bound(_check_name, name)
        checks[f"auxiliary_models.{name}.training"] = partial(_check_acts, name, table)
        checks[f"auxiliary_models.{name}.model"] = partial(_check_model, run, table.model)
        if table.prompt is not None:
            checks[f"auxiliary_models.{name}.prompt"] = _bound(_check_prompt, table.prompt)
    return checks


def _bound(check: Callable[[str], None], text: str) -> Callable[[], None]:
    return lambda: check(text)


def _check_name(name: str) -> None:
    if name in TAKEN or not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", name):
        raise UserError(
            f"an auxiliary model cannot be called {name!r}: {', '.join(TAKEN)} are taken, and a name has letters, digits and hyphens. "
            "Write for example better."
        )


def _check_acts(name: str, table: AuxiliaryModelTable) -> None:
    """Refuse an auxiliary model that is the reference itself, or whose keys wait for a training that it does not have."""
    idle = sorted(table.model_fields_set & {"objective", "swap_labels", "fraction", "subset", "adapter"})
    if table.training is None and idle:
        raise UserError(
            f"the auxiliary model {name} has {', '.join(idle)} and no training, so it would be used as it is. Write training: {{...}} with fields "
            "of transformers.TrainingArguments, or leave the rest out."
        )
    if table.training is None and table.model is None and table.prompt is None:
        raise UserError(
            f"the auxiliary model {name} is the reference itself: it has neither a model, nor a prompt, nor a training. Write one of them."
        )


def _check_model(run: Run, model: str | None) -> None:
    if model is None:
        return
    if model in run.recipe.auxiliary_models and not Path(model).is_dir():
        raise UserError(
            f"model is {model!r}, which is an auxiliary model of this recipe, and auxiliary models are not made from each other. Name a folder or a hub "
            "name, such as the folder auxiliary-NAME/model of another run."
        )
    check_start(model, trust_remote_code=run.recipe.model.trust_remote_code)


def _check_prompt(text: str) -> None:
    if PLACE not in text:
        raise UserError(
            f"the auxiliary model's prompt is {text!r}, which does not hold {PLACE}, so every prompt would be the same. Write it where "
            "the user's own words belong."
        )


def check_reads(run: Run, scorer: Scorer) -> None:
    """Refuse a scorer that reads a model or a value which the run does not have.

    Raises:
        UserError: says what there is.
    """
    known = ("policy", "reference", "oracle", "reward", "data", *run.recipe.auxiliary_models)
    for value in reads_of(scorer):
        if value.model not in known:
            raise UserError(
                f"the scorer reads {value}, and there is no model {value.model!r}. There are {', '.join(known[:3])} and the "
                f"auxiliary_models of the recipe ({', '.join(run.recipe.auxiliary_models) or 'none'}); write a table auxiliary_models."
            )
        if value.online and value.kind not in IN_THE_STEP:
            raise UserError(
                f"the scorer reads {value}; in the step the policy gives {', '.join(IN_THE_STEP)} only. Read it of the "
                "reference or of an auxiliary model."
            )
    if is_online(scorer):
        check_in_the_step(scorer)
