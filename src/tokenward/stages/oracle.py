"""The stages that train models for scorers: the oracle, and the recipe's auxiliary_models."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from tokenward.api.prepare import prepare_rows, trained_on
from tokenward.api.training import LookAt
from tokenward.artifacts import StageFolder
from tokenward.config import AuxiliaryModelTable, OracleTable, Recipe
from tokenward.models.loading import LanguageModel
from tokenward.objectives import needs_of
from tokenward.stages.auxiliary import auxiliary_start, reads_model
from tokenward.stages.base import Checks, Training, TrainingStage
from tokenward.stages.part_checks import check_objective_without_scores
from tokenward.stages.preview import FILE, previewing
from tokenward.stages.run import AUXILIARY, Run
from tokenward.stages.subset import (
    first_is_worse,
    subset_inputs,
    subset_pairs,
    subset_settings,
    turned,
    with_longest,
    with_subset,
)
from tokenward.stages.tables import Tables, random_part, tables
from tokenward.stages.training import fit_stage, load_to_train, model_settings, reference_of, scored_by
from tokenward.tokens.encode import prompted
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Template


class ScorerModelStage(TrainingStage):
    """Trains a model that scorers read, on a random part of the pairs.

    Attributes:
        salt: Part of the seed with which the pairs are drawn.
    """

    salt: str

    def adapter(self, recipe: Recipe) -> tuple[str, dict[str, Any] | None]:
        """The adapter of the stage's table, or of the table ``model``."""
        own = self.table(recipe).adapter
        return super().adapter(recipe) if own == "inherit" else (f"{self.key}.adapter", own)

    def checks(self, run: Run) -> Checks:
        """The objective must not read scores."""
        objective = self.table(run.recipe).objective
        return {f"{self.key}.objective": lambda: check_objective_without_scores(self.title, objective)}

    def part(self, run: Run, train: TokenTable) -> TokenTable:
        """The random part of the training pairs that the recipe asks for."""
        return random_part(run, train, self.table(run.recipe).fraction, self.salt)

    def fit(
        self,
        run: Run,
        folder: StageFolder,
        start: LanguageModel,
        train: TokenTable,
        evaluation: TokenTable,
        change: Callable[[TokenRow], TokenRow] | None = None,
        preview: LookAt | None = None,
    ) -> dict[str, Any]:
        """Train a model on pairs; returns facts for the manifest.

        Args:
            run: The run.
            folder: Folder of the stage.
            start: The model before training.
            train: Training rows.
            evaluation: Eval rows.
            change: Applied to each row, such as another prompt.
            preview: As in :func:`tokenward.api.training.fit_model`.
        """
        rows = (train, evaluation)
        if change is not None:
            rows = (replace(part, change=change) for part in rows)
        ready = prepare_rows(
            *rows,
            objective=self.objective(run),
            with_reference=reference_of(run, start, prompted=change is not None),
            say=run.display.line,
        )
        table, adapter = self.table(run.recipe).training or {}, self.adapter(run.recipe)[1]
        facts = fit_stage(
            run,
            folder,
            start,
            ready.objective,
            ready.rows,
            table,
            eval_rows=ready.eval,
            adapter=adapter,
            preview=preview,
        )
        return {**scored_by(run), **facts}


class OracleStage(ScorerModelStage):
    """Train the oracle from the reference (SePO, section 3.1)."""

    name, key, title, salt = "oracle", "oracle", "the oracle", "oracle"

    def table(self, recipe: Recipe) -> OracleTable:
        """The table ``oracle``."""
        return recipe.oracle

    def needed(self, run: Run) -> bool:
        """Whether a scorer reads the oracle."""
        return reads_model(run, "oracle")

    def start(self, recipe: Recipe) -> str:
        """The reference."""
        return recipe.oracle.model or recipe.model.name

    def settings(self, run: Run) -> Mapping[str, Any]:
        """The table and the model settings."""
        return {"oracle": run.recipe.oracle.model_dump(exclude={"model"}), **model_settings(run)}

    def inputs(self, run: Run) -> Mapping[str, str]:
        """The reference."""
        return {"reference": run.done("reference").identity}

    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        """Train."""
        sets = _tables(run)
        start = load_to_train(run, run.reference_model, folder, self.table(run.recipe).training)
        preview = previewing(run, sets, folder.path / FILE)
        return self.fit(run, folder, start, self.part(run, sets.part("train")), sets.eval, preview=preview)

    def unpaired_advice(self) -> str:
        """KTO, or a run without an oracle."""
        return (
            "Write oracle.objective: {name: kto}, or do without an oracle: scores: {scorer: {name: surprisal}}, with "
            "policy: {selection: {name: all}} if every token is to train."
        )

    def planned(self, run: Run, template: Template) -> Training:
        """Its part of the pairs."""
        sets = _tables(run) if run.recipe.oracle.model else tables(run, template)
        return self.plan(run, self.part(run, sets.train), eval=sets.eval)


class AuxiliaryStage(ScorerModelStage):
    """Train an auxiliary model: like the oracle, from its own model, on its own part of the pairs, with its own prompt.

    A model with a subset writes ``subset.jsonl`` before training.

    Args:
        model: Name of the auxiliary model.
    """

    def __init__(self, model: str) -> None:
        self.model, self.name, self.key = model, f"{AUXILIARY}{model}", f"auxiliary_models.{model}"
        self.title, self.salt = f"the auxiliary model {model}", model

    def table(self, recipe: Recipe) -> AuxiliaryModelTable:
        """The table of the auxiliary model."""
        return recipe.auxiliary_models[self.model]

    def start(self, recipe: Recipe) -> str:
        """Its own model, or the reference."""
        return self.table(recipe).model or recipe.oracle.model or recipe.model.name

    def settings(self, run: Run) -> Mapping[str, Any]:
        """The table, the settings that determine the subset, and the model settings."""
        table = self.table(run.recipe)
        return {
            self.name: table.model_dump(exclude={"model"}),
            **subset_settings(run, table),
            **model_settings(run),
        }

    def inputs(self, run: Run) -> Mapping[str, str]:
        """The reference, the model that training starts from, and the models behind the subset."""
        return {
            "reference": run.done("reference").identity,
            "model": run.fingerprint_of(auxiliary_start(run, self.model)),
            **subset_inputs(run, self.table(run.recipe)),
        }

    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        """Choose the subset and train."""
        table, sets = self.table(run.recipe), _tables(run)
        picked = None if table.subset is None else subset_pairs(run, folder, table.subset)
        pairs = self.part(run, sets.part("train"))
        start = load_to_train(run, auxiliary_start(run, self.model), folder, table.training)
        change = None
        if table.prompt is not None:
            template, context = start.template(run.style), run.limits.context
            change = partial(prompted, template=template, text=table.prompt, context=context)
        train, evaluation = self._training_rows(run, pairs, picked), self._oriented(run, sets.eval)
        facts = self.fit(run, folder, start, train, evaluation, change)
        return facts if picked is None else {**facts, "picked": len(picked)}

    def _training_rows(self, run: Run, pairs: TokenTable, picked: TokenTable | None) -> TokenTable:
        """The model's part of the pairs, and its subset if it has one."""
        table = self.table(run.recipe)
        if table.subset is None or picked is None:
            return self._oriented(run, pairs)
        own = None if table.subset.alone else self._oriented(run, pairs)
        chosen = picked.swapped() if turned(table) else picked
        rows = with_subset(own, chosen, pairwise=needs_of(self.objective(run)).pairwise)
        others = 0 if own is None else len(own)
        run.display.line(f"  training on {len(rows) - others} rows of the subset and {others} others")
        return rows

    def _oriented(self, run: Run, pairs: TokenTable) -> TokenTable:
        """Pairs with swapped labels if the recipe says so; the best response of each prompt if the objective needs no pairs."""
        objective = self.objective(run)
        rows = pairs.swapped() if first_is_worse(self.table(run.recipe)) else pairs
        if needs_of(objective).pairwise or not len(rows):
            return rows
        return trained_on(objective, rows, run.display.line).best_once()

    def unpaired_problem(self, run: Run) -> str:
        """Swapped labels and subsets need pairs."""
        table = self.table(run.recipe)
        if table.swap_labels or table.subset is not None:
            return f"{self.title} uses swap_labels or subset, which need pairs. Leave these keys out, or give pairs."
        return super().unpaired_problem(run)

    def planned(self, run: Run, template: Template) -> Training:
        """Its part of the pairs, with the longest pairs in place of the subset, which is not known yet."""
        sets = _tables(run) if run.recipe.oracle.model else tables(run, template)
        subset = self.table(run.recipe).subset
        own = self.part(run, sets.train)
        rows = own if subset is None else with_longest(own, sets.train, subset)
        return self.plan(run, rows, eval=sets.eval)


def _tables(run: Run) -> Tables:
    return tables(run, run.tokenizer_template(run.reference_model))
