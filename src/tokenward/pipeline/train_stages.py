"""The stages that train a model on whole responses: SFT and the eval reward model; what every training stage shares."""

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
    title_of,
    unpaired_of,
)
from tokenward.pipeline.context import Run
from tokenward.pipeline.data import encode_set, pair_sets, pair_settings
from tokenward.pipeline.fit import fit
from tokenward.pipeline.rows import LazyRows, prompts_of
from tokenward.pipeline.values import computed_values, with_reference
from tokenward.pipeline.watch import eval_prompts, watching
from tokenward.tokens.rows import TokenRow

_PROMPT = np.uint64(3)  # beside the hash of a response, so that names are of both; the sums wrap around


def train_sft(run: Run) -> Manifest | None:
    """Fine-tune the recipe's model on the preferred responses; nothing if the recipe has no ``sft`` table."""
    table = run.recipe.sft
    if table is None:
        return None
    name = run.whole(run.recipe.model.name)
    # SFT trains every weight, whatever model.adapter says: what follows starts from one ordinary model.
    dtype = {"model": {"dtype": run.recipe.model.dtype}}
    settings = {"sft": table.model_dump(), **pair_settings(run), **dtype}
    inputs = {"data": run.done("data").fingerprint, "model": run.fingerprint_of(name)}
    with run.stage("sft", settings, inputs) as stage:
        if not stage.done:
            model = run.load(name)
            sets = pair_sets(run)
            rows = best_once(token_rows(run, sets.train, model))
            eval_rows = best_once(token_rows(run, sets.eval, model, may_be_empty=True))
            prompts = eval_prompts(run, model.template(run.style))
            watch = watching(run, model, prompts, stage.path)
            stage.complete(
                **fit(run, stage, model, SFT(), rows, table.training, eval_rows=eval_rows, watch=watch)
            )
    return run.done("sft")


def train_eval_reward(run: Run) -> Manifest | None:
    """Train a second oracle on pairs that nothing else has seen; nothing without a ``eval_reward`` table."""
    table = run.recipe.eval_reward
    if table is None:
        return None
    settings = {"eval_reward": table.model_dump(), **model_settings(run)}
    with run.stage("eval_reward", settings, {"reference": run.done("reference").fingerprint}) as stage:
        if not stage.done:
            objective = objective_of("objective", table.objective, run.recipe.seed)
            model = adapted(run, run.load(run.reference_model), run.recipe.model.adapter)
            sets = pair_sets(run)
            rows = with_reference(run, trained_on(run, objective, token_rows(run, sets.eval_reward, model)))
            eval_rows = with_reference(run, token_rows(run, sets.eval, model, may_be_empty=True))
            beside = frozen_reference(run, objective, model)
            facts = fit(
                run, stage, model, objective, rows, table.training, eval_rows=eval_rows, reference=beside
            )
            stage.complete(**scored_by(run), **facts)
    return run.done("eval_reward")


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
    if not needs_frozen_reference(objective) or model.has_adapter:
        return None
    return run.load(model.name)


def token_rows(
    run: Run, comparisons: Choice, model: LanguageModel, *, may_be_empty: bool = False
) -> LazyRows:
    """Comparisons as ids, by the template of a model."""
    template = model.template(run.style)
    return LazyRows(encoded=encode_set(run, comparisons, template, may_be_empty=may_be_empty).rows)


def best_once(rows: Sequence[TokenRow]) -> LazyRows:
    """Rows whose preferred response is the best of its prompt, each prompt once.

    Rules that make several pairs of a ranked list would count its best response several times, and
    its second as if it were the best. Of responses that stand alone every good one is kept.
    """
    lazy = rows if isinstance(rows, LazyRows) else LazyRows(encoded=[row.encoded for row in rows])
    known, prompts = lazy.responses, prompts_of(lazy.encoded)
    sizes = np.diff(known.starts)
    names = np.repeat(prompts, sizes) * _PROMPT + known.digests
    first = names[known.starts[:-1]]
    never = np.flatnonzero(~np.isin(first, names[known.ranks > 0]))
    _, once = np.unique(np.where(sizes == 1, first, prompts)[never], return_index=True)
    return lazy.choose(never[np.sort(once)])


def trained_on(run: Run, objective: Objective, rows: LazyRows) -> LazyRows:
    """Rows without the bad responses that stand alone, where the objective learns nothing from such a one.

    Raises:
        UserError: none is left.
    """
    known = rows.responses
    left_out = (np.diff(known.starts) == 1) & (known.ranks[known.starts[:-1]] > 0)
    if unpaired_of(objective) != "good" or not left_out.any():
        return rows
    if left_out.all():
        raise UserError(
            f"every row is a bad response alone, and {title_of(objective)} trains on good ones. Give good ones (label true), or "
            "write the objective {name: kto}, which learns from both."
        )
    run.display.line(
        f"  {int(left_out.sum())} rows left out: a bad response alone, from which {title_of(objective)} learns nothing"
    )
    return rows.choose(np.flatnonzero(~left_out))


def reply_names(rows: LazyRows, place: int) -> np.ndarray:
    """A number that names one response of each row together with its prompt.  -> [rows] uint64"""
    responses = rows.responses
    # Sums of hashes; they wrap around.
    return prompts_of(rows.encoded) * _PROMPT + responses.digests[responses.starts[:-1] + place]


def with_own_reference(run: Run, start: LanguageModel, rows: LazyRows) -> LazyRows:
    """Rows with the log-probabilities of a model before its training."""
    with run.display.progress("reference", int(rows.responses.starts[-1])) as bar:
        column = computed_values(run, start, rows.encoded, progress=bar.advance)
    return rows.with_column("reference_logp", column)
