"""The stage that trains the policy on the tokens that its scores select."""

from collections.abc import Mapping
from typing import Any

from tokenward.api.prepare import kept_line, kept_shares, prepare_rows
from tokenward.artifacts import StageFolder
from tokenward.config import PolicyTable, Recipe
from tokenward.errors import UserError
from tokenward.models.loading import absolute_name
from tokenward.scoring.store import TokenStore
from tokenward.selection import scope_of, selector_of, unit_of
from tokenward.stages.auxiliary import scorer_of
from tokenward.stages.base import Checks, Training, TrainingStage
from tokenward.stages.data import preview
from tokenward.stages.other_tokens import policy_template
from tokenward.stages.part_checks import check_policy_objective, check_selection
from tokenward.stages.run import Run
from tokenward.stages.tables import tables
from tokenward.stages.training import (
    eval_prompts,
    fit_stage,
    load_to_train,
    model_settings,
    reference_of,
    scored_by,
    watching,
)
from tokenward.tokens.template import Template


class PolicyStage(TrainingStage):
    """Select tokens by their scores and train the policy on them (SePO, sections 3.2 and 3.3)."""

    name, key, title = "policy", "policy", "the policy"

    def table(self, recipe: Recipe) -> PolicyTable:
        """The table ``policy``."""
        return recipe.policy

    def start(self, recipe: Recipe) -> str:
        """The table's own model, or that of the table ``model``."""
        return recipe.policy.model or recipe.model.name

    def settings(self, run: Run) -> Mapping[str, Any]:
        """The table, the scorer and the model settings."""
        return {
            "policy": run.recipe.policy.model_dump(exclude={"model"}),
            "scores": {"scorer": run.recipe.scores.scorer.model_dump()},
            **model_settings(run),
        }

    def inputs(self, run: Run) -> Mapping[str, str]:
        """The scores, and the model that training starts from."""
        return {"scores": run.done("scores").identity, "model": run.fingerprint_of(run.policy_start)}

    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        """Select tokens and train."""
        table = run.recipe.policy
        start = load_to_train(run, run.policy_start, folder, table.training)
        template = start.template(run.style)
        _check_template(run, template)
        pairs = tables(run, template)
        evaluates = table.training.get("eval_strategy", "no") != "no"
        ready = prepare_rows(
            pairs.part("train"),
            pairs.eval if evaluates else pairs.eval[:0],
            objective=self.objective(run),
            selector=selector_of(table.selection, run.recipe.seed),
            scorer=scorer_of(run),
            store=TokenStore(run.path("scores")),
            tokenizer=template.tokenizer,
            with_reference=reference_of(run, start),
            say=run.display.line,
        )
        rows = ready.rows
        run.display.line(kept_line(ready))
        first = ready.prepare([*rows[:8]], 0)[:1] if ready.prepare else rows[:1]
        preview(run.display, template, first, weighted=not ready.online)
        facts = fit_stage(
            run,
            folder,
            start,
            ready.objective,
            rows,
            table.training,
            eval_rows=ready.eval,
            prepare=ready.prepare,
            adapter=run.recipe.model.adapter,
            watch=lambda model: watching(run, model, eval_prompts(run, template), folder.path),
        )
        # Weights that are computed during training have no share yet; history.jsonl has it.
        made = "weights" in rows.columns
        shares = {"kept": kept_shares(rows), "nothing_selected": ready.dropped} if made else {}
        return {"start": absolute_name(run.policy_start), **shares, **scored_by(run), **facts}

    def checks(self, run: Run) -> Checks:
        """The selection and the objective must fit the scorer."""
        return {
            "policy.selection": lambda: check_selection(run),
            "policy.objective": lambda: check_policy_objective(run),
        }

    def planned(self, run: Run, template: Template) -> Training:
        """The training pairs. Tokens kept by a selection of scope batch, or over words, are not counted."""
        sets = tables(run, template if run.recipe.policy.model is None else policy_template(run))
        selector = selector_of(run.recipe.policy.selection, run.recipe.seed)
        uncounted = scope_of(selector) == "batch" or unit_of(selector)
        return self.plan(
            run, sets.train, selector=None if uncounted else selector, eval=sets.eval, watched=True
        )


def _check_template(run: Run, template: Template) -> None:
    """Refuse a policy with another tokenizer or chat template than the rows of the scores."""
    known = run.done("scores").facts["tokens"]["template"]
    if template.fingerprint != known:
        raise UserError(
            f"the scores belong to other tokens than those of {run.policy_start}: its tokenizer or chat template has changed. Run the "
            "recipe again from the scores.",
            code="tokenizer-mismatch",
            key="policy.model",
        )
