"""The stages that train a model on whole responses: SFT and the eval reward model; what every training stage shares."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from transformers.trainer_utils import IntervalStrategy

from tokenward.api.prepare import needs_frozen_copy, with_new_adapter
from tokenward.artifacts import StageFolder
from tokenward.errors import UserError
from tokenward.models.base import TokenModel
from tokenward.models.loading import LanguageModel, lasting
from tokenward.objectives import Objective
from tokenward.scoring.join import computed, with_reference
from tokenward.scoring.store import TokenStore
from tokenward.stages.run import Run
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.table import Column, TokenTable
from tokenward.training.arguments import check_batches, training_arguments
from tokenward.training.fit import fit


def scored_by(run: Run) -> dict[str, Any]:
    """What a scorer of texts must know to do as the run does, from any folder."""
    return {
        "reference": lasting(run.reference_model),
        **run.style.facts(),
        "dtype": run.recipe.model.dtype,
        "attention": run.recipe.model.attention,
        "precision": run.recipe.scores.precision,
    }


def model_settings(run: Run) -> dict[str, Any]:
    """What of the recipe decides a trained model beside its own table."""
    table = run.recipe.model
    model = {"dtype": table.dtype, "adapter": table.adapter, "packing": table.packing}
    if table.head_mlp is not None:
        model["head_mlp"] = table.head_mlp
    return {"model": model, "seed": run.recipe.seed}


def adapted(run: Run, model: LanguageModel, adapter: Any) -> LanguageModel:
    """The model with a new adapter to train, if the recipe has one."""
    settings = run.recipe.model.adapter if adapter == "inherit" else adapter
    return with_new_adapter(model, settings, run.recipe.seed)


def frozen_reference(run: Run, objective: Objective, model: LanguageModel) -> LanguageModel | None:
    """A second copy of a model before its training, if the objective compares with it in the step."""
    return run.load(model.name) if needs_frozen_copy(objective, model) else None


def fit_stage(
    run: Run,
    stage: StageFolder,
    model: TokenModel,
    objective: Objective,
    rows: Sequence[TokenRow],
    table: dict[str, Any],
    *,
    defaults: Mapping[str, Any] = MappingProxyType({}),
    eval_rows: Sequence[TokenRow] = (),
    **more: Any,
) -> dict[str, Any]:
    """Train a model by a ``training`` table of the recipe, in the folder of a stage; returns facts for its manifest.

    Args:
        run: The run.
        stage: Folder of the stage; the training goes on from a checkpoint in it.
        model: The model before training.
        objective: What to minimise.
        rows: Training comparisons.
        table: The recipe's ``training`` table.
        defaults: Values for keys that the table leaves out, if they differ from those of other stages.
        eval_rows: Comparisons for ``eval_strategy``.
        more: As :func:`tokenward.training.fit.fit` takes it.

    Raises:
        UserError: as there; or the table evaluates, and there is nothing to evaluate on.
    """
    where = f"{stage.path.name}.training"
    arguments = training_arguments(
        {**defaults, **table},
        folder=stage.path / "checkpoints",
        seed=run.recipe.seed,
        where=where,
        device=run.recipe.model.device,
    )
    if not eval_rows and arguments.eval_strategy != IntervalStrategy.NO:
        advice = "Raise data.eval" if run.recipe.data.eval is None else "Give data.eval more rows"
        raise UserError(
            f"{where}.eval_strategy is {IntervalStrategy(arguments.eval_strategy).value}, but there is no held-out "
            f"comparison to evaluate on. {advice}, or write eval_strategy: no."
        )
    check_batches(table, len(rows), where)
    shared = {
        "style": run.style,
        "display": run.display,
        "where": where,
        "reference_precision": run.recipe.scores.precision,
    }
    facts = fit(model, objective, rows, arguments, stage.path, eval_rows=eval_rows, **shared, **more)
    if "save_strategy" not in table:
        stage.temporary.append(stage.path / "checkpoints")  # only there to go on after a stop
    return facts


def with_own_reference(run: Run, start: LanguageModel, rows: TokenTable) -> TokenTable:
    """Rows with the log-probabilities of a model before its training."""
    return rows.with_column("reference_logp", logprobs(run, start, rows, "reference"))


def logprobs(run: Run, model: LanguageModel, rows: TokenTable, label: str) -> Column:
    """Log-probabilities of a model, with a bar."""
    scores = run.recipe.scores
    with run.display.progress(label, len(rows.responses)) as bar:
        return computed(
            rows,
            model,
            precision=scores.precision,
            tokens_per_batch=scores.tokens_per_batch,
            progress=bar.advance,
        )


def referenced(run: Run, rows: TokenTable) -> TokenTable:
    """Rows with the log-probabilities of the reference stage."""
    return with_reference(rows, TokenStore(run.path("reference")))
