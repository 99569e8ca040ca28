"""Whether scorer, selection and objectives of a run can work, and work together: asked before anything is computed."""

from collections.abc import Mapping
from typing import Any

from tokenward.api.values import frozen_values
from tokenward.config import Named
from tokenward.errors import UserError
from tokenward.models.identity import has_encoder, layer_count
from tokenward.objectives import SFT, Objective, needs_of, objective_of
from tokenward.objectives.selected import Selected
from tokenward.plugins import find
from tokenward.sampling.sources.base import check_source
from tokenward.scoring.basic import check_spans
from tokenward.scoring.reads import Value, is_online
from tokenward.scoring.scorers import Scorer
from tokenward.selection import scope_of, selector_of, unit_of
from tokenward.stages.auxiliary import check_reads, scorer_of
from tokenward.stages.run import Run

_ANY_MODEL = ("", "logp")
"""Kinds of values that a model with an encoder gives too."""


def check_scorer(run: Run, scorer: Scorer) -> None:
    """Refuse a scorer that reads what is not there: a model, a layer of it, a verifier, a file.

    Raises:
        UserError: says what there is.
    """
    check_reads(run, scorer)
    for value in frozen_values(scorer):
        if value.kind == "critical":
            name = value.details["verifier"]
            check_source(name, find("verifier", name, {}), ("references",), kind="verifier")
        elif value.kind == "file":
            check_spans(value.details["file"])
        if value.model not in ("data", "reward"):
            _check_inside(run, value)


def _check_inside(run: Run, value: Value) -> None:
    """Refuse a look into a model that its config does not allow."""
    name, trust = _made_from(run, value.model), run.recipe.model.trust_remote_code
    layer = value.details.get("layer")
    if layer is not None:
        count = layer_count(name, trust_remote_code=trust)
        if not -count <= layer < count:
            raise UserError(
                f"the scorer reads layer {layer} of the {value.model}, and {name} has {count} layers. Write a number from 0 to "
                f"{count - 1}, or from -1, the last, to {-count}."
            )
    if value.kind not in _ANY_MODEL and name != "default" and has_encoder(name, trust_remote_code=trust):
        raise UserError(
            f"the scorer reads {value.kind} of the {value.model}, and {name} has an encoder, of which only log-probabilities are "
            "read. Use another scorer."
        )


def _made_from(run: Run, model: str) -> str:
    """The model that the recipe names at the beginning of what becomes the oracle or an auxiliary model."""
    auxiliary = run.recipe.auxiliary_models.get(model)
    own = auxiliary.model if auxiliary is not None else None
    return own or run.recipe.oracle.model or run.recipe.model.name


def check_selection(run: Run) -> None:
    """Refuse a selection that its settings, or the scorer beside it, do not allow.

    Raises:
        UserError: it looks at more than it would be shown.
    """
    selector = selector_of(run.recipe.policy.selection, run.recipe.seed)
    if is_online(scorer_of(run)):
        Selected(SFT(), selector, scorer_of(run))  # made for its checks alone
    elif unit_of(selector) and scope_of(selector) == "batch":
        raise UserError(
            f"the selection pools over {unit_of(selector)} and has scope: batch, and batches do not know their words. Write another "
            "scope."
        )


def check_policy_objective(run: Run) -> None:
    """Refuse an objective that reads stored scores where the policy's own numbers are scored in the step.

    Raises:
        UserError: as above, or the objective cannot be made.
    """
    table = run.recipe.policy.objective
    objective = objective_of("objective", table)
    if needs_of(objective).scores and is_online(scorer_of(run)):
        raise UserError(
            f"{_who(table, objective)} reads stored scores, and the scorer reads the policy, whose scores are made in the step and stored "
            "nowhere. Write a scorer that reads frozen models, or leave what reads scores out of the objective."
        )


def check_objective_without_scores(stage: str, table: Named) -> None:
    """Refuse an objective that reads scores in a stage that comes before them, or has none.

    Args:
        stage: Who trains with it.
        table: The recipe's.

    Raises:
        UserError: as above, or the objective cannot be made.
    """
    objective = objective_of("objective", table)
    if needs_of(objective).scores:
        raise UserError(
            f"{_who(table, objective)} reads scores of tokens, and {stage} is trained without any. Use it in the policy table, or an "
            "objective without a selection of its own, such as {name: dpo}."
        )


def _who(table: Named, objective: Objective) -> str:
    terms = table.arguments.get("terms")
    if table.name != "sum" or not isinstance(terms, list):
        return f"the objective {table.name}"
    parts = zip(terms, getattr(objective, "parts", ()), strict=True)
    names = [_term_name(term) for term, part in parts if needs_of(part).scores]
    return f"the sum's term {' and '.join(names)}"


def _term_name(term: Mapping[str, Any]) -> str:
    return f"{term['name']} with its selection" if "selection" in term else str(term["name"])
