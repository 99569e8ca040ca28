"""The stage that trains the policy on the tokens that its scores select."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from tokenward.artifacts import StageFolder
from tokenward.config import PolicyTable, Recipe
from tokenward.errors import UserError
from tokenward.models.loading import LanguageModel, lasting
from tokenward.objectives import Objective, is_pairwise, needs_reference, needs_scores
from tokenward.objectives.selected import Selected
from tokenward.scoring.join import scored, with_read_values
from tokenward.scoring.reads import is_online
from tokenward.scoring.store import TokenStore
from tokenward.selection import Selector, scope_of, selector_of, unit_of
from tokenward.selection.weights import weigh, weigh_step
from tokenward.stages.base import Checks, Training, TrainingStage
from tokenward.stages.constant import warn_of_scores, warn_of_weights
from tokenward.stages.part_checks import check_policy_objective, check_selection
from tokenward.stages.preview import preview
from tokenward.stages.run import Run
from tokenward.stages.scorers import scorer_of
from tokenward.stages.tables import tables
from tokenward.stages.training import (
    adapted,
    fit_stage,
    frozen_reference,
    model_settings,
    referenced,
    scored_by,
    trained_on,
    with_own_reference,
)
from tokenward.stages.watch import eval_prompts, watching
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
        pairs = tables(run, template)
        rows = trained_on(run, objective, pairs.part("train"))
        in_step, alike = is_online(scorer_of(run)), False
        if in_step:
            objective, rows = (
                _in_the_step(run, objective, selector),
                with_read_values(rows, scorer_of(run), _scores(run)),
            )
        else:
            rows = scored(rows, scorer_of(run), _scores(run))
            alike = warn_of_scores(run, scorer_of(run), [np.asarray(rows.columns["scores"].flat)])
        if needs_reference(objective):
            rows = _policy_reference(run, start, rows)
        by_step = partial(weigh_step, selector) if scope_of(selector) == "batch" and not in_step else None
        rows, dropped = (rows, 0) if in_step else _weighted(run, selector, objective, rows, template)
        if "weights" in rows.columns and not alike:
            warn_of_weights(run, selector, rows)
        run.display.line(_kept_line(rows, dropped))
        first = by_step([*rows[:8]])[:1] if by_step else rows[:1]
        preview(run.display, template, first, weighted=not in_step)
        model = adapted(run, start, run.recipe.model.adapter)
        eval_rows = _held_out(run, objective, start, pairs.eval)
        eval_rows = (
            with_read_values(eval_rows, scorer_of(run), _scores(run)) if in_step and eval_rows else eval_rows
        )
        prepare = None if by_step is None else lambda batch, step: by_step(batch)
        facts = fit_stage(
            run,
            folder,
            model,
            objective,
            rows,
            table.training,
            eval_rows=eval_rows,
            prepare=prepare,
            reference=frozen_reference(run, objective, model),
            watch=watching(run, model, eval_prompts(run, template), folder.path),
        )
        # Weights that are made online have no share yet; the history has it.
        shares = {"kept": _kept(rows), "nothing_selected": dropped} if "weights" in rows.columns else {}
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


def _in_the_step(run: Run, objective: Objective, selector: Selector) -> Objective:
    """The objective with weights that are made of the policy's own numbers as it trains."""
    return Selected(objective, selector, scorer_of(run))


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


def _held_out(run: Run, objective: Objective, start: LanguageModel, rows: TokenTable) -> TokenTable:
    """Held-out pairs, every token with weight 1: scores must not choose what the policy is judged by.

    An objective that reads scores itself has them there too.
    """
    if run.recipe.policy.training.get("eval_strategy", "no") == "no":
        return rows[:0]
    rows = trained_on(run, objective, rows) if len(rows) else rows
    if needs_scores(objective) and len(rows) and not is_online(scorer_of(run)):
        rows = scored(rows, scorer_of(run), _scores(run))
    return _policy_reference(run, start, rows) if needs_reference(objective) else rows


def _weighted(
    run: Run, selector: Selector, objective: Objective, rows: TokenTable, template: Template
) -> tuple[TokenTable, int]:
    """Rows with their weights; those that have none where the objective needs some cannot train and are counted.

    An objective over pairs needs weights on both sides, another one on the best response, or on the only one.
    """
    if scope_of(selector) == "batch":
        return rows, 0
    weighted = weigh(rows, selector, template.tokenizer)
    found = _selected(weighted) > 0
    if not is_pairwise(objective):
        sizes = weighted.sizes
        found |= (weighted.ranks > 0) & (np.repeat(sizes, sizes) > 1)
    some = np.minimum.reduceat(found, weighted.starts[:-1])
    if not some.any():
        raise UserError(
            "the selection keeps no token of any pair, so there is nothing to train on. Raise policy.selection's fractions, "
            "or lower its threshold."
        )
    return weighted.where(some), int((~some).sum())


def _selected(rows: TokenTable) -> np.ndarray:
    """How many tokens of each response have weight.  -> [responses]"""
    flat, starts = rows.columns["weights"]
    sizes = rows.lengths
    parts = zip(
        starts, sizes, strict=True
    )  # not as lists of numbers, which would take a hundred bytes a pair
    return np.fromiter(
        (np.count_nonzero(flat[first : first + size]) for first, size in parts), np.int64, len(sizes)
    )


def _kept(rows: TokenTable) -> dict[str, float]:
    """The share of tokens with weight, by side; a side without responses is left out."""
    counts, sizes = _selected(rows), rows.lengths
    worse = rows.ranks > 0
    sides = {"chosen": ~worse, "rejected": worse}
    return {name: float(counts[side].sum() / sizes[side].sum()) for name, side in sides.items() if side.any()}


def _kept_line(rows: TokenTable, dropped: int) -> str:
    if "weights" not in rows.columns:
        return f"  {_count(rows)}; tokens are selected in the step"
    shares = ", ".join(f"{side} {share:.1%}" for side, share in _kept(rows).items())
    line = f"  {_count(rows)}; kept tokens: {shares}"
    return line + (
        f"; {dropped} pairs dropped: nothing selected where the objective needs some" if dropped else ""
    )


def _count(rows: TokenTable) -> str:
    alone = int((rows.sizes == 1).sum())
    parts = {"pairs": len(rows) - alone, "responses alone": alone}
    return ", ".join(f"{count} {name}" for name, count in parts.items() if count)
