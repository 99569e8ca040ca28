"""The stage that trains the policy on the tokens that its scores select."""

from collections.abc import Mapping
from typing import Any

from tokenward.api.inputs import say_counts
from tokenward.api.own_replies import (
    DEVICE_BATCH,
    OwnReplies,
    check_baseline,
    check_same_tokens,
    of_all_processes,
)
from tokenward.api.prepare import kept_line, kept_shares, prepare_rows
from tokenward.api.prompts import Prompts, different_prompts
from tokenward.api.training import with_new_adapter
from tokenward.artifacts import StageFolder
from tokenward.config import PolicyTable, Recipe, RolloutSettings
from tokenward.errors import UserError
from tokenward.models.loading import LanguageModel, absolute_name
from tokenward.objectives import needs_of
from tokenward.sampling.rollouts import ScoredSampler
from tokenward.scoring.store import TokenStore
from tokenward.selection import scope_of, selector_of, unit_of
from tokenward.stages.auxiliary import scorer_of
from tokenward.stages.base import Checks, Training, TrainingStage
from tokenward.stages.data import preview
from tokenward.stages.other_tokens import policy_template
from tokenward.stages.own_replies import own_replies_checks, planned_replies, rewards_of
from tokenward.stages.part_checks import check_policy_objective, check_selection
from tokenward.stages.run import Run
from tokenward.stages.tables import ranked_lists, tables
from tokenward.stages.tasks import sampler_of
from tokenward.stages.training import (
    eval_prompts,
    fit_stage,
    load_to_train,
    model_settings,
    reference_of,
    scored_by,
    watching,
)
from tokenward.tokens.encode import check_some_left
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
        own = set() if on_own_replies(run) else set(RolloutSettings.model_fields)
        return {
            "policy": run.recipe.policy.model_dump(exclude={"model", *own}),
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
        if on_own_replies(run):
            return self._on_own_replies(run, folder, start, template)
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

    def _on_own_replies(
        self, run: Run, folder: StageFolder, start: LanguageModel, template: Template
    ) -> Mapping[str, Any]:
        """Train on replies that the policy writes to the prompts of the comparisons; see :class:`OwnReplies`."""
        table, objective = run.recipe.policy, self.objective(run)
        check_baseline(objective, table.rollouts)
        rows, examples = self._prompts(run, template)
        reference = run.load(run.policy_start) if needs_of(objective).reference else None
        policy = with_new_adapter(start, run.recipe.model.adapter, run.recipe.seed)
        rewards = rewards_of(run)
        for model in rewards.models.values():
            check_same_tokens(policy, model, "model of the scorer", "scores.scorer")
        replies = OwnReplies(
            samples=ScoredSampler(sampler=sampler_of(run, policy, table), source=None, name=""),
            count=table.rollouts,
            rewards=rewards,
            examples=examples,
            reference=reference,
            seed=run.recipe.seed,
            say=run.display.line,
            **run.passes,
        )
        run.display.line(
            f"  {len(rows)} prompts, {table.rollouts} replies to each in a step; every token is trained"
        )
        size = int(table.training.get("per_device_train_batch_size", DEVICE_BATCH))
        facts = fit_stage(
            run,
            folder,
            policy,
            objective,
            rows,
            table.training,
            prepare=of_all_processes(replies, rows, size),
            watch=lambda model: watching(run, model, eval_prompts(run, template), folder.path),
        )
        replies.show()
        return {"start": absolute_name(run.policy_start), **scored_by(run), **facts}

    def _prompts(self, run: Run, template: Template) -> Prompts:
        """The different prompts of the training comparisons, within the limit of prompts."""
        rows, counts = ranked_lists(run, template)[0].fitting(run.limits.of_prompts)
        check_some_left(counts)
        say_counts(counts, "prompts", run.display.line)
        longest = run.recipe.policy.sampling.max_new_tokens
        return different_prompts(rows, run.limits.context, longest, run.display.line)

    def checks(self, run: Run) -> Checks:
        """The selection and the objective must fit the scorer."""
        if on_own_replies(run):
            return own_replies_checks(run)
        return {
            "policy.selection": lambda: check_selection(run),
            "policy.objective": lambda: check_policy_objective(run),
        }

    def planned(self, run: Run, template: Template) -> Training:
        """The training pairs. Tokens kept by a selection of scope batch, or over words, are not counted."""
        if on_own_replies(run):
            table = run.recipe.policy
            prompts = [row.prompt for row in self._prompts(run, template).rows]
            return self.plan(
                run, planned_replies(prompts, table.rollouts, table.sampling.max_new_tokens), watched=True
            )
        sets = tables(run, template if run.recipe.policy.model is None else policy_template(run))
        selector = selector_of(run.recipe.policy.selection, run.recipe.seed)
        uncounted = scope_of(selector) == "batch" or unit_of(selector)
        return self.plan(
            run, sets.train, selector=None if uncounted else selector, eval=sets.eval, watched=True
        )


def on_own_replies(run: Run) -> bool:
    """Whether the policy trains on replies that it writes itself."""
    return run.recipe.policy.objective.name == "reinforce"


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
