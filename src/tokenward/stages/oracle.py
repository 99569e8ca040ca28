"""The stages that train a model for scorers to read: the oracle, and the recipe's auxiliary_models."""

from dataclasses import replace
from functools import partial
from typing import Any

from tokenward.artifacts import Manifest, StageFolder
from tokenward.config import AuxiliaryModelTable, OracleTable
from tokenward.models.loading import LanguageModel
from tokenward.objectives import Objective, needs_of, objective_of
from tokenward.stages.auxiliary import auxiliary_start, prompted
from tokenward.stages.fit import fit
from tokenward.stages.run import AUXILIARY, Run
from tokenward.stages.subset import (
    first_is_worse,
    picked_pairs,
    subset_inputs,
    subset_settings,
    turned,
    with_picked,
)
from tokenward.stages.tables import Tables, random_part, tables
from tokenward.stages.training import (
    adapted,
    frozen_reference,
    model_settings,
    referenced,
    scored_by,
    trained_on,
    with_own_reference,
)
from tokenward.tokens.table import TokenTable


def train_oracle(run: Run) -> Manifest:
    """Train the DPO oracle from the reference, on a random fraction of the pairs (SePO, section 3.1)."""
    table = run.recipe.oracle
    settings = {"oracle": table.model_dump(exclude={"model"}), **model_settings(run)}
    inputs = {"reference": run.done("reference").fingerprint}
    with run.stage("oracle", settings, inputs) as stage:
        if not stage.done:
            pairs = random_part(run, _tables(run).part("train"), table.fraction, "oracle")
            stage.complete(**_preference_model(run, stage, table, run.reference_model, pairs))
    return run.done("oracle")


def train_auxiliary(run: Run, name: str) -> Manifest:
    """Train an auxiliary model as the oracle is trained, from its own model, on its own part of the pairs, under its own prompt.

    An auxiliary model with picks leaves ``subset.jsonl``, which is written before the training begins.
    """
    table = run.recipe.auxiliary_models[name]
    start = auxiliary_start(run, name)
    # The fingerprint of an auxiliary model without picks does not depend on there being such a key.
    unsaid = {"model"} if table.subset is not None else {"model", "subset"}
    settings = {
        f"{AUXILIARY}{name}": table.model_dump(exclude=unsaid),
        **subset_settings(run, table),
        **model_settings(run),
    }
    inputs = {
        "reference": run.done("reference").fingerprint,
        "model": run.fingerprint_of(start),
        **subset_inputs(run, table),
    }
    with run.stage(f"{AUXILIARY}{name}", settings, inputs) as stage:
        if not stage.done:
            picked = None if table.subset is None else picked_pairs(run, stage, table.subset)
            pairs = random_part(run, _tables(run).part("train"), table.fraction, name)
            stage.complete(**_preference_model(run, stage, table, start, pairs, picked))
    return run.done(f"{AUXILIARY}{name}")


def _tables(run: Run) -> Tables:
    return tables(run, run.tokenizer_template(run.reference_model))


def _preference_model(
    run: Run,
    stage: StageFolder,
    table: OracleTable | AuxiliaryModelTable,
    start: str,
    pairs: TokenTable,
    picked: TokenTable | None = None,
) -> dict[str, Any]:
    """Train a model that scores shall read; returns the facts of its stage."""
    objective = objective_of("objective", table.objective, run.recipe.seed)
    auxiliary = table if isinstance(table, AuxiliaryModelTable) else None
    base = run.load(start)
    # Before an adapter goes on it: what it says then is what it is compared with.
    train = _trained_rows(run, objective, auxiliary, pairs, picked)
    eval_rows = _oriented_rows(run, objective, auxiliary, _tables(run).eval)
    train, eval_rows = (_as_read(run, base, objective, auxiliary, rows) for rows in (train, eval_rows))
    model = adapted(run, base, table.adapter)
    beside = frozen_reference(run, objective, model)
    facts = fit(
        run, stage, model, objective, train, table.training or {}, eval_rows=eval_rows, reference=beside
    )
    more = {} if picked is None else {"picked": len(picked)}
    return {**scored_by(run), **more, **facts}


def _trained_rows(
    run: Run,
    objective: Objective,
    auxiliary: AuxiliaryModelTable | None,
    pairs: TokenTable,
    picked: TokenTable | None,
) -> TokenTable:
    """What a model is trained on: its part of the pairs, and its picks where it has some."""
    if auxiliary is None or auxiliary.subset is None or picked is None:
        return _oriented_rows(run, objective, auxiliary, pairs)
    alone = auxiliary.subset.alone
    own = None if alone else _oriented_rows(run, objective, auxiliary, pairs)
    chosen = picked.swapped() if turned(auxiliary) else picked
    rows = with_picked(own, chosen, pairwise=needs_of(objective).pairwise)
    already = 0 if own is None else len(own)
    run.display.line(f"  {len(rows) - already} rows of the subset train, beside {already} others")
    return rows


def _oriented_rows(
    run: Run,
    objective: Objective,
    auxiliary: AuxiliaryModelTable | None,
    pairs: TokenTable,
) -> TokenTable:
    """Pairs in the order in which an auxiliary model trains on them, or each prompt's best response where it needs no pairs."""
    swapped = auxiliary is not None and first_is_worse(auxiliary)
    rows = pairs.swapped() if swapped else pairs
    rows = trained_on(run, objective, rows) if len(rows) else rows
    single = auxiliary is not None and not needs_of(objective).pairwise
    return rows.best_once() if single and len(rows) else rows


def _as_read(
    run: Run,
    base: LanguageModel,
    objective: Objective,
    auxiliary: AuxiliaryModelTable | None,
    rows: TokenTable,
) -> TokenTable:
    """Rows under an auxiliary model's prompt, with reference values where its objective needs them."""
    if auxiliary is not None and auxiliary.prompt is not None:
        template, context = base.template(run.style), run.limits.context
        change = partial(prompted, template=template, text=auxiliary.prompt, context=context)
        rows = replace(rows, change=change)
    elif base.fingerprint == run.done("reference").inputs["model"]:
        return referenced(run, rows)
    return with_own_reference(run, base, rows) if needs_of(objective).reference else rows
