"""The stage that trains the eval reward model: a second oracle on pairs that nothing else has seen."""

from collections.abc import Mapping
from typing import Any

from tokenward.api.prepare import trained_on
from tokenward.artifacts import StageFolder
from tokenward.config import EvalRewardTable, Recipe
from tokenward.stages.base import Checks, Training, TrainingStage
from tokenward.stages.part_checks import check_objective_without_scores
from tokenward.stages.run import Run
from tokenward.stages.tables import tables
from tokenward.stages.training import (
    adapted,
    fit_stage,
    frozen_reference,
    model_settings,
    referenced,
    scored_by,
)
from tokenward.tokens.template import Template


class EvalRewardStage(TrainingStage):
    """Train a second oracle, which judges the policy."""

    name, key, title = "eval_reward", "eval_reward", "the eval reward model"

    def table(self, recipe: Recipe) -> EvalRewardTable | None:
        """The table ``eval_reward``."""
        return recipe.eval_reward

    def start(self, recipe: Recipe) -> str:
        """The reference."""
        return recipe.oracle.model or recipe.model.name

    def settings(self, run: Run) -> Mapping[str, Any]:
        """Its table and how models are held."""
        assert run.recipe.eval_reward is not None
        return {"eval_reward": run.recipe.eval_reward.model_dump(), **model_settings(run)}

    def inputs(self, run: Run) -> Mapping[str, str]:
        """The reference."""
        return {"reference": run.done("reference").fingerprint}

    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        """Train."""
        assert run.recipe.eval_reward is not None
        objective = self.objective(run)
        model = adapted(run, run.load(run.reference_model), run.recipe.model.adapter)
        sets = tables(run, model.template(run.style))
        rows = referenced(run, trained_on(objective, sets.part("eval_reward"), run.display.line))
        facts = fit_stage(
            run,
            folder,
            model,
            objective,
            rows,
            run.recipe.eval_reward.training,
            eval_rows=referenced(run, sets.eval),
            reference=frozen_reference(run, objective, model),
        )
        return {**scored_by(run), **facts}

    def checks(self, run: Run) -> Checks:
        """An objective that needs no scores."""
        table = run.recipe.eval_reward
        if table is None:
            return {}
        return {"eval_reward.objective": lambda: check_objective_without_scores(self.title, table.objective)}

    def planned(self, run: Run, template: Template) -> Training:
        """The pairs that nothing else has seen."""
        sets, table = tables(run, template), run.recipe.eval_reward
        assert table is not None
        return Training(
            self.name,
            self.key,
            table.training,
            sets.eval_reward,
            self.objective(run),
            run.recipe.model.adapter,
            self.start(run.recipe),
            eval=sets.eval,
        )
