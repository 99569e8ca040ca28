"""The stage that trains the policy on the tokens that its scores select."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from tokenward.api.prepare import kept_line, kept_shares, prepared
from tokenward.artifacts import StageFolder
from tokenward.config import PolicyTable, Recipe
from tokenward.errors import UserError
from tokenward.models.loading import LanguageModel, lasting
from tokenward.scoring.scorers import Scorer
from tokenward.scoring.store import TokenStore
from tokenward.selection import Selector, scope_of, selector_of, unit_of
from tokenward.stages.auxiliary import scorer_of
from tokenward.stages.base import Checks, Training, TrainingStage
from tokenward.stages.constant import warn_of_scores, warn_of_weights
from tokenward.stages.data import preview
from tokenward.stages.part_checks import check_policy_objective, check_selection
from tokenward.stages.run import Run
from tokenward.stages.tables import tables
from tokenward.stages.training import (
    adapted,
    eval_prompts,
    fit_stage,
    frozen_reference,
    model_settings,
    referenced,
    scored_by,
    watching,
    with_own_reference,
)
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Template


class PolicyStage(TrainingStage):
    """Select tokens by their scores and train the policy on them (SePO, sections 3.2 and 3.3)."""

    name, key, title = "policy", "policy", "the policy"

    def table(self, recipe: Recipe) -> PolicyTable:
        """The table ``policy``."""
        return recipe.policy

    def start(self, recipe: Recipe) -> str:
        """Its own model, or the recipe's."""
        return recipe.policy.model or recipe.model.name

    def settings(self, run: Run) -> Mapping[str, Any]:
        """Its table, the scorer, and how models are held."""
        return {
            "policy": run.recipe.policy.model_dump(exclude={"model"}),
            "scores": {"scorer": run.recipe.scores.scorer.model_dump()},
            **model_settings(run),
        }

    def inputs(self, run: Run) -> Mapping[str, str]:
        """The scores and the model that it starts from."""
        return {"scores": run.done("scores").fingerprint, "model": run.fingerprint_of(run.policy_start)}

    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        """Select and train."""
        table = run.recipe.policy
        objective = self.objective(run)
        selector = selector_of(table.selection, run.recipe.seed)
        start = run.load(run.policy_start)
        template = start.template(run.style)
        _same_template(run, template)
        pairs, scorer = tables(run, template), scorer_of(run)
        looks = table.training.get("eval_strategy", "no") != "no"
        ready = prepared(
            pairs.part("train"),
            pairs.eval if looks else pairs.eval[:0],
            objective=objective,
            selector=selector,
            scorer=scorer,
            store=_scores(run),
            tokenizer=template.tokenizer,
            with_reference=partial(_policy_reference, run, start),
            say=run.display.line,
        )
        rows = ready.rows
        _warn(run, selector, scorer, rows)
        run.display.line(kept_line(rows, ready.dropped))
        first = ready.prepare([*rows[:8]], 0)[:1] if ready.prepare else rows[:1]
        preview(run.display, template, first, weighted=not ready.online)
        model = adapted(run, start, run.recipe.model.adapter)
        facts = fit_stage(
            run,
            folder,
            model,
            ready.objective,
            rows,
            table.training,
            eval_rows=ready.eval,
            prepare=ready.prepare,
            reference=frozen_reference(run, ready.objective, model),
            watch=watching(run, model, eval_prompts(run, template), folder.path),
        )
        # Weights that are made online have no share yet; the history has it.
        made = "weights" in rows.columns
        shares = {"kept": kept_shares(rows), "nothing_selected": ready.dropped} if made else {}
        return {"start": lasting(run.policy_start), **shares, **scored_by(run), **facts}

    def checks(self, run: Run) -> Checks:
        """A selection and an objective that fit the scorer."""
        return {
            "policy.selection": lambda: check_selection(run),
            "policy.objective": lambda: check_policy_objective(run),
        }

    def planned(self, run: Run, template: Template) -> Training:
        """The training pairs; which tokens a batch or a text's sentences would keep is not counted."""
        sets, table = tables(run, template), run.recipe.policy
        selector = selector_of(table.selection, run.recipe.seed)
        return Training(
            self.name,
            self.key,
            table.training,
            sets.train,
            self.objective(run),
            run.recipe.model.adapter,
            self.start(run.recipe),
            None if scope_of(selector) == "batch" or unit_of(selector) else selector,
            sets.eval,
            watched=True,
        )


def _scores(run: Run) -> TokenStore:
    return TokenStore(run.path("scores"))


def _warn(run: Run, selector: Selector, scorer: Scorer, rows: TokenTable) -> None:
    """Say so if all scores, or all weights, are one number."""
    if "scores" not in rows.columns:
        return
    alike = warn_of_scores(run, scorer, [np.asarray(rows.columns["scores"].flat)])
    if "weights" in rows.columns and not alike:
        warn_of_weights(run, selector, rows)


def _same_template(run: Run, template: Template) -> None:
    """Refuse a policy that writes prompts otherwise than the models that scored them."""
    if template.fingerprint != run.done("reference").inputs["template"]:
        raise UserError(
            f"{run.policy_start} has another tokenizer or chat template than {run.reference_model}, whose scores these are: "
            "the two must share a tokenizer and its template. Use the same family of models, or copy the one's "
            "tokenizer files into the other's folder."
        )


def _policy_reference(run: Run, start: LanguageModel, rows: TokenTable) -> TokenTable:
    """Reference values of an objective that compares with the policy's own start."""
    if start.fingerprint == run.done("reference").inputs["model"]:
        return referenced(run, rows)
    return with_own_reference(run, start, rows)
