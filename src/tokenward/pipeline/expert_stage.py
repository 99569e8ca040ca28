"""The stages that train a model for scorers to read: the oracle, and the recipe's experts."""

from typing import Any

from tokenward.artifacts import Manifest, StageFolder
from tokenward.config import ExpertTable, OracleTable
from tokenward.data.choice import Choice
from tokenward.models.loading import LanguageModel
from tokenward.objectives import Objective, is_pairwise, needs_reference, objective_of
from tokenward.pipeline.context import EXPERT, Run
from tokenward.pipeline.data import oracle_pairs, pair_sets, random_part
from tokenward.pipeline.experts import expert_start, prompted
from tokenward.pipeline.fit import fit
from tokenward.pipeline.rows import LazyRows
from tokenward.pipeline.train_stages import (
    adapted,
    best_once,
    frozen_reference,
    model_settings,
    scored_by,
    token_rows,
    with_own_reference,
)
from tokenward.pipeline.values import with_reference


def train_oracle(run: Run) -> Manifest:
    """Train the DPO oracle from the reference, on a random fraction of the pairs (SePO, section 3.1)."""
    table = run.recipe.oracle
    settings = {"oracle": table.model_dump(exclude={"model"}), **model_settings(run)}
    inputs = {"reference": run.done("reference").fingerprint}
    with run.stage("oracle", settings, inputs) as stage:
        if not stage.done:
            pairs = oracle_pairs(run, pair_sets(run).train)
            stage.complete(**_preference_model(run, stage, table, run.reference_model, pairs))
    return run.done("oracle")


def train_expert(run: Run, name: str) -> Manifest:
    """Train an expert as the oracle is trained, from its own model, on its own part of the pairs, under its own prompt."""
    table = run.recipe.experts[name]
    start = expert_start(run, name)
    settings = {f"{EXPERT}{name}": table.model_dump(exclude={"model"}), **model_settings(run)}
    inputs = {"reference": run.done("reference").fingerprint, "model": run.fingerprint_of(start)}
    with run.stage(f"{EXPERT}{name}", settings, inputs) as stage:
        if not stage.done:
            pairs = random_part(run, pair_sets(run).train, table.fraction, name)
            stage.complete(**_preference_model(run, stage, table, start, pairs))
    return run.done(f"{EXPERT}{name}")


def _preference_model(
    run: Run, stage: StageFolder, table: OracleTable | ExpertTable, start: str, pairs: Choice
) -> dict[str, Any]:
    """Train a model that scores shall read; returns the facts of its stage."""
    objective = objective_of("objective", table.objective)
    base = run.load(start)
    # Before an adapter goes on it: what it says then is what it is compared with.
    train, held_out = (
        _expert_rows(run, base, objective, table, part, may_be_empty=place == 1)
        for place, part in enumerate((pairs, pair_sets(run).held_out))
    )
    model = adapted(run, base, table.adapter)
    beside = frozen_reference(run, objective, model)
    facts = fit(
        run, stage, model, objective, train, table.training or {}, held_out=held_out, reference=beside
    )
    return {**scored_by(run), **facts}


def _expert_rows(
    run: Run,
    base: LanguageModel,
    objective: Objective,
    table: OracleTable | ExpertTable,
    pairs: Choice,
    *,
    may_be_empty: bool,
) -> LazyRows:
    """Pairs as an expert reads them, with reference values where its objective needs them."""
    expert = table if isinstance(table, ExpertTable) else ExpertTable()
    rows = token_rows(run, pairs.swapped() if expert.swapped else pairs, base, may_be_empty=may_be_empty)
    if table is expert and not is_pairwise(objective) and len(rows):
        rows = best_once(rows)
    if expert.prompt is not None:
        template, context = base.template(run.recipe.tokens.template), run.limits.context
        rows = LazyRows(encoded=[prompted(row, template, expert.prompt, context) for row in rows.encoded])
    elif base.fingerprint == run.done("reference").inputs["model"]:
        return with_reference(run, rows)
    return with_own_reference(run, base, rows) if needs_reference(objective) else rows
