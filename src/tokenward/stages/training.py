"""The stages that train a model on whole responses: SFT and the eval reward model; what every training stage shares."""

from typing import Any

import torch

from tokenward.errors import UserError
from tokenward.models.loading import LanguageModel, lasting
from tokenward.objectives import Objective, needs_of, title_of
from tokenward.scoring.join import computed, with_reference
from tokenward.scoring.store import TokenStore
from tokenward.stages.run import Run
from tokenward.tokens.table import Column, TokenTable


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
    """The model with a new adapter to train, where the recipe has one."""
    settings = run.recipe.model.adapter if adapter == "inherit" else adapter
    torch.manual_seed(run.recipe.seed)  # an adapter begins with random weights
    return model if settings is None else model.with_adapter(settings)


def frozen_reference(run: Run, objective: Objective, model: LanguageModel) -> LanguageModel | None:
    """A second copy of a model before its training, where the objective compares with it in the step.

    A model with an adapter needs none: it is its own reference without it.
    """
    if not needs_of(objective).frozen_reference or model.has_adapter:
        return None
    return run.load(model.name)


def trained_on(run: Run, objective: Objective, rows: TokenTable) -> TokenTable:
    """Rows without the bad responses that stand alone, where the objective learns nothing from such a one.

    Raises:
        UserError: none is left.
    """
    left_out = (rows.sizes == 1) & (rows.ranks[rows.starts[:-1]] > 0)
    if needs_of(objective).unpaired != "good" or not left_out.any():
        return rows
    if left_out.all():
        raise UserError(
            f"every row is a bad response alone, and {title_of(objective)} trains on good ones. Give good ones (label true), or "
            "write the objective {name: kto}, which learns from both."
        )
    run.display.line(
        f"  {int(left_out.sum())} rows left out: a bad response alone, from which {title_of(objective)} learns nothing"
    )
    return rows.where(~left_out)


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
