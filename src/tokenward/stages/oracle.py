"""The stages that train a model for scorers to read: the oracle, and the recipe's auxiliary_models."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from tokenward.api.prepare import trained_on
from tokenward.artifacts import StageFolder
from tokenward.config import AuxiliaryModelTable, OracleTable, Recipe
from tokenward.models.loading import LanguageModel
from tokenward.objectives import Objective, needs_of, objective_of
from tokenward.stages.auxiliary import auxiliary_start, reads_model
from tokenward.stages.base import Checks, Training, TrainingStage
from tokenward.stages.part_checks import check_objective_without_scores
from tokenward.stages.run import AUXILIARY, Run
from tokenward.stages.subset import (
    first_is_worse,
    picked_pairs,
    subset_inputs,
    subset_settings,
    turned,
    with_longest,
    with_picked,
)
from tokenward.stages.tables import Tables, random_part, tables
from tokenward.stages.training import (
    adapted,
    fit_stage,
    frozen_reference,
    model_settings,
    referenced,
    scored_by,
    with_own_reference,
)
from tokenward.tokens.encode import prompted
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Template


class OracleStage(TrainingStage):
    """Train the oracle from the reference, on a random fraction of the pairs (SePO, section 3.1)."""

    name, key, title = "oracle", "oracle", "the oracle"

    def table(self, recipe: Recipe) -> OracleTable:
        """The table ``oracle``."""
        return recipe.oracle

    def needed(self, run: Run) -> bool:
        """Whether a scorer reads the oracle."""
        return reads_model(run, "oracle")

    def start(self, recipe: Recipe) -> str:
        """The reference."""
        return recipe.oracle.model or recipe.model.name

    def adapter(self, recipe: Recipe) -> tuple[str, dict[str, Any] | None]:
        """Its own, or that of the table ``model``."""
        own = recipe.oracle.adapter
        return ("oracle.adapter", own) if own != "inherit" else super().adapter(recipe)  # type: ignore[return-value]

    def settings(self, run: Run) -> Mapping[str, Any]:
        """Its table and how models are held."""
        return {"oracle": run.recipe.oracle.model_dump(exclude={"model"}), **model_settings(run)}

    def inputs(self, run: Run) -> Mapping[str, str]:
        """The reference."""
        return {"reference": run.done("reference").fingerprint}

    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        """Train."""
        table = run.recipe.oracle
        pairs = random_part(run, _tables(run).part("train"), table.fraction, "oracle")
        return _preference_model(run, folder, table, run.reference_model, pairs)

    def checks(self, run: Run) -> Checks:
        """An objective that needs no scores."""
        objective = run.recipe.oracle.objective
        return {"oracle.objective": lambda: check_objective_without_scores(self.title, objective)}

    def unpaired_advice(self) -> str:
        """KTO, or no oracle at all."""
        return (
            "Write oracle.objective: {name: kto}, or do without an oracle: scores: {scorer: {name: surprisal}}, with "
            "policy: {selection: {name: all}} if every token is to train."
        )

    def planned(self, run: Run, template: Template) -> Training:
        """Its part of the pairs."""
        sets, table = tables(run, template), run.recipe.oracle
        rows = random_part(run, sets.train, table.fraction, "oracle")
        adapter, start = self.adapter(run.recipe)[1], self.start(run.recipe)
        return Training(
            self.name, self.key, table.training, rows, self.objective(run), adapter, start, eval=sets.eval
        )


class AuxiliaryStage(TrainingStage):
    """Train an auxiliary model as the oracle is trained, from its own model, on its own part of the pairs, under its own prompt.

    One with a subset leaves ``subset.jsonl``, which is written before the training begins.

    Args:
        model: Its name.
    """

    def __init__(self, model: str) -> None:
        self.model, self.name, self.key = model, f"{AUXILIARY}{model}", f"auxiliary_models.{model}"
        self.title = f"the auxiliary model {model}"

    def table(self, recipe: Recipe) -> AuxiliaryModelTable:
        """Its table."""
        return recipe.auxiliary_models[self.model]

    def start(self, recipe: Recipe) -> str:
        """Its own model, or the reference."""
        return self.table(recipe).model or recipe.oracle.model or recipe.model.name

    def adapter(self, recipe: Recipe) -> tuple[str, dict[str, Any] | None]:
        """Its own, or that of the table ``model``."""
        own = self.table(recipe).adapter
        return (f"{self.key}.adapter", own) if own != "inherit" else super().adapter(recipe)  # type: ignore[return-value]

    def settings(self, run: Run) -> Mapping[str, Any]:
        """Its table, what decides its subset, and how models are held."""
        table = self.table(run.recipe)
        return {
            self.name: table.model_dump(exclude={"model"}),
            **subset_settings(run, table),
            **model_settings(run),
        }

    def inputs(self, run: Run) -> Mapping[str, str]:
        """The reference, its own start, and what its subset is made from."""
        return {
            "reference": run.done("reference").fingerprint,
            "model": run.fingerprint_of(auxiliary_start(run, self.model)),
            **subset_inputs(run, self.table(run.recipe)),
        }

    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        """Pick the subset and train."""
        table = self.table(run.recipe)
        picked = None if table.subset is None else picked_pairs(run, folder, table.subset)
        pairs = random_part(run, _tables(run).part("train"), table.fraction, self.model)
        return _preference_model(run, folder, table, auxiliary_start(run, self.model), pairs, picked)

    def checks(self, run: Run) -> Checks:
        """An objective that needs no scores."""
        objective = self.table(run.recipe).objective
        return {f"{self.key}.objective": lambda: check_objective_without_scores(self.title, objective)}

    def unpaired_problem(self, run: Run) -> str:
        """Exchanged labels and subsets need pairs, whatever the objective."""
        table = self.table(run.recipe)
        if table.swap_labels or table.subset is not None:
            return f"{self.title} exchanges or picks pairs (swap_labels, subset). Leave these keys out, or give pairs."
        return super().unpaired_problem(run)

    def planned(self, run: Run, template: Template) -> Training:
        """Its part of the pairs, and the longest pairs in place of those that it will pick."""
        sets, table = tables(run, template), self.table(run.recipe)
        own = random_part(run, sets.train, table.fraction, self.model)
        rows = own if table.subset is None else with_longest(own, sets.train, table.subset)
        adapter, start = self.adapter(run.recipe)[1], self.start(run.recipe)
        return Training(
            self.name,
            self.key,
            table.training or {},
            rows,
            self.objective(run),
            adapter,
            start,
            eval=sets.eval,
        )


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
    facts = fit_stage(
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
    rows = trained_on(objective, rows, run.display.line) if len(rows) else rows
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
