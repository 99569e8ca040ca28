"""The stages that train a model on whole responses: SFT and the referee; what every training stage shares."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tokenward.artifacts import Manifest
from tokenward.data.choice import Choice
from tokenward.errors import UserError
from tokenward.models.loading import LanguageModel, lasting
from tokenward.objectives import (
    SFT,
    Objective,
    needs_frozen_reference,
    objective_of,
)
from tokenward.pipeline.context import Run
from tokenward.pipeline.data import encode_set, pair_sets, pair_settings
from tokenward.pipeline.fit import fit
from tokenward.pipeline.rows import LazyRows, prompts_of
from tokenward.pipeline.values import computed_values, with_reference
from tokenward.pipeline.watch import held_out_prompts, watching
from tokenward.tokens.rows import TokenRow


def train_sft(run: Run) -> Manifest | None:
    """Fine-tune the recipe's model on the preferred responses; nothing if the recipe has no ``sft`` table."""
    table = run.recipe.sft
    if table is None:
        return None
    name = run.recipe.model.name
    # SFT trains every weight, whatever model.adapter says: what follows starts from one ordinary model.
    dtype = {"model": {"dtype": run.recipe.model.dtype}}
    settings = {"sft": table.model_dump(), **pair_settings(run), **dtype}
    inputs = {"data": run.done("data").fingerprint, "model": run.fingerprint_of(name)}
    with run.stage("sft", settings, inputs) as stage:
        if not stage.done:
            model = run.load(name)
            sets = pair_sets(run)
            rows = best_once(token_rows(run, sets.train, model))
            held_out = best_once(token_rows(run, sets.held_out, model, may_be_empty=True))
            prompts = held_out_prompts(run, model.template(run.recipe.tokens.template))
            watch = watching(run, model, prompts, stage.path)
            stage.complete(
                **fit(run, stage, model, SFT(), rows, table.training, held_out=held_out, watch=watch)
            )
    return run.done("sft")


def train_referee(run: Run) -> Manifest | None:
    """Train a second oracle on pairs that nothing else has seen; nothing without a ``referee`` table."""
    table = run.recipe.referee
    if table is None:
        return None
    settings = {"referee": table.model_dump(), **model_settings(run)}
    with run.stage("referee", settings, {"reference": run.done("reference").fingerprint}) as stage:
        if not stage.done:
            objective = objective_of("objective", table.objective, run.recipe.seed)
            model = adapted(run, run.load(run.reference_model), run.recipe.model.adapter)
            sets = pair_sets(run)
            rows = with_reference(run, token_rows(run, sets.referee, model))
            held_out = with_reference(run, token_rows(run, sets.held_out, model, may_be_empty=True))
            beside = frozen_reference(run, objective, model)
            facts = fit(
                run, stage, model, objective, rows, table.training, held_out=held_out, reference=beside
            )
            stage.complete(**scored_by(run), **facts)
    return run.done("referee")


def scored_by(run: Run) -> dict[str, str]:
    """What a scorer of texts must know to do as the run does, from any folder."""
    return {
        "reference": lasting(run.reference_model),
        "template": run.recipe.tokens.template,
        "dtype": run.recipe.model.dtype,
        "attention": run.recipe.model.attention,
        "precision": run.recipe.scores.precision,
    }


def model_settings(run: Run) -> dict[str, Any]:
    """What of the recipe decides a trained model beside its own table."""
    table = run.recipe.model
    model = {"dtype": table.dtype, "adapter": table.adapter, "rows": table.rows}
    if table.head_mlp is not None:
        model["head_mlp"] = table.head_mlp
    return {"model": model, "seed": run.recipe.seed}


def adapted(run: Run, model: LanguageModel, adapter: Any) -> LanguageModel:
    """The model with a new adapter to train, where the recipe has one."""
    settings = run.recipe.model.adapter if adapter == "inherit" else adapter
    if model.has_adapter:
        raise UserError(
            f"{model.name} is an adapter on a base model; training starts from whole weights. Merge it first: "
            "AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(NEW_FOLDER), with the "
            "tokenizer's files beside it, and name the new folder."
        )
    torch.manual_seed(run.recipe.seed)  # an adapter begins with random weights
    return model if settings is None else model.with_adapter(settings)


def frozen_reference(run: Run, objective: Objective, model: LanguageModel) -> LanguageModel | None:
    """A second copy of a model before its training, where the objective compares with it in the step.

    A model with an adapter needs none: it is its own reference without it.
    """
    if not needs_frozen_reference(objective) or model.has_adapter:
        return None
    return run.load(model.name)


def token_rows(
    run: Run, comparisons: Choice, model: LanguageModel, *, may_be_empty: bool = False
) -> LazyRows:
    """Comparisons as ids, by the template of a model."""
    template = model.template(run.recipe.tokens.template)
    return LazyRows(encoded=encode_set(run, comparisons, template, may_be_empty=may_be_empty).rows)


def best_once(rows: Sequence[TokenRow]) -> LazyRows:
    """Rows whose preferred response is the best of its prompt, each prompt once.

    Rules that make several pairs of a ranked list would count its best response several times, and
    its second as if it were the best.
    """
    lazy = rows if isinstance(rows, LazyRows) else LazyRows(encoded=[row.encoded for row in rows])
    whole, losers = (reply_names(lazy, place) for place in (0, 1))
    never = np.flatnonzero(~np.isin(whole, losers))
    _, first = np.unique(prompts_of(lazy.encoded)[never], return_index=True)
    return lazy.choose(never[np.sort(first)])


def reply_names(rows: LazyRows, place: int) -> np.ndarray:
    """A number that names one response of each row together with its prompt.  -> [rows] uint64"""
    responses = rows.responses
    # Sums of hashes; they wrap around.
    return prompts_of(rows.encoded) * np.uint64(3) + responses.digests[responses.starts[:-1] + place]


def with_own_reference(run: Run, start: LanguageModel, rows: LazyRows) -> LazyRows:
    """Rows with the log-probabilities of a model before its training."""
    with run.display.progress("reference", 2 * len(rows)) as bar:
        column = computed_values(run, start, rows.encoded, progress=bar.advance)
    return rows.with_column("reference_logp", column)
