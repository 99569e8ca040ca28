"""Checks whether scorer, selection and objectives of a run work together, made before anything is computed."""

from tokenward.api.values import frozen_values
from tokenward.config import Named
from tokenward.errors import UserError
from tokenward.models.identity import has_encoder, layer_count
from tokenward.objectives import SFT, needs_of, objective_of
from tokenward.objectives.selected import Selected
from tokenward.plugins import find
from tokenward.sampling.sources.base import check_source
from tokenward.scoring.basic import check_spans
from tokenward.scoring.reads import Value, is_online
from tokenward.scoring.scorers import Scorer
from tokenward.selection import scope_of, selector_of, unit_of
from tokenward.stages.auxiliary import check_reads, scorer_of
from tokenward.stages.run import Run

_ANY_MODEL = ("", "logp")  # values that a model with an encoder gives too


def check_scorer(run: Run, scorer: Scorer) -> None:
    """Check that the run has every model, layer, verifier and file that a scorer reads.

    Raises:
        UserError: one is missing.
    """
    check_reads(run, scorer)
    for value in frozen_values(scorer):
        if value.kind == "critical":
            name = value.details["verifier"]
            check_source(name, find("verifier", name, {}), ("references",), kind="verifier")
        elif value.kind == "file":
            check_spans(value.details["file"])
        if value.model not in ("data", "reward"):
            _check_architecture(run, value)


def _check_architecture(run: Run, value: Value) -> None:
    """Check a value of a model against the model's config."""
    auxiliary, trust = run.recipe.auxiliary_models.get(value.model), run.recipe.model.trust_remote_code
    own = None if auxiliary is None else auxiliary.model
    name = own or run.recipe.oracle.model or run.recipe.model.name
    layer = value.details.get("layer")
    if layer is not None:
        count = layer_count(name, trust_remote_code=trust)
        if not -count <= layer < count:
            raise UserError(
                f"the scorer reads layer {layer} of the {value.model}, and {name} has {count} layers. Use 0 to {count - 1}, or -1 (the "
                f"last) to {-count}.",
                code="no-layer",
            )
    if value.kind not in _ANY_MODEL and name != "default" and has_encoder(name, trust_remote_code=trust):
        raise UserError(
            f"the scorer reads {value.kind} of the {value.model}, but only log-probabilities can be read of {name}, which has an "
            "encoder. Use another scorer.",
            code="unsupported-model",
        )


def check_selection(run: Run) -> None:
    """Check that the selection sees everything that it needs.

    Raises:
        UserError: it does not.
    """
    selector, scorer = selector_of(run.recipe.policy.selection, run.recipe.seed), scorer_of(run)
    if is_online(scorer):
        Selected(SFT(), selector, scorer)  # built for its checks only
    elif unit_of(selector) and scope_of(selector) == "batch":
        raise UserError(
            f"the selection pools over {unit_of(selector)}, which scope: batch does not know. Use another scope.",
            code="unsupported-scope",
        )


def check_policy_objective(run: Run) -> None:
    """Check that the policy's objective has the scores that it reads.

    Raises:
        UserError: it reads stored scores, and the scorer reads the policy in training.
    """
    reader = _score_reader(run.recipe.policy.objective)
    if reader and is_online(scorer_of(run)):
        raise UserError(
            f"{reader} reads stored scores, but the scorer reads the policy, so its scores are computed during training and not "
            "stored. Use a scorer of frozen models, or an objective without scores.",
            code="needs-scores",
        )


def check_objective_without_scores(stage: str, table: Named) -> None:
    """Check that an objective reads no scores, because its stage comes before them or has none.

    Raises:
        UserError: the objective reads scores, or cannot be built.
    """
    if reader := _score_reader(table):
        raise UserError(
            f"{reader} reads token scores, and {stage} is trained without them. Use another objective here, such as {{name: dpo}}.",
            code="needs-scores",
        )


def _score_reader(table: Named) -> str:
    """The objective, or the terms of a sum, that read scores; empty if none does."""
    objective = objective_of("objective", table)
    if not needs_of(objective).scores:
        return ""
    terms = table.arguments.get("terms")
    if table.name != "sum" or not isinstance(terms, list):
        return f"the objective {table.name}"
    parts = zip(terms, getattr(objective, "parts", ()), strict=True)
    names = [
        f"{term['name']} with its selection" if "selection" in term else str(term["name"])
        for term, part in parts
        if needs_of(part).scores
    ]
    return f"the sum's term {' and '.join(names)}"
