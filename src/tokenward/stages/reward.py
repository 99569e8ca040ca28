"""The reward stage: a token reward learned from the ranks in the data (TLM)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tokenward.api.constant import CHECKED_REWARDS, warn_of_rewards
from tokenward.api.prepare import reward_rows
from tokenward.artifacts import StageFolder
from tokenward.config import Recipe, RewardTable
from tokenward.objectives import Objective
from tokenward.stages.auxiliary import reads_model
from tokenward.stages.base import Checks, TrainingStage
from tokenward.stages.online import fresh_reward, head_settings, reward_start
from tokenward.stages.reward_learning import DEFAULTS, reward_objective
from tokenward.stages.run import Run
from tokenward.stages.tables import encoded_fingerprint, random_part, ranked_lists, say_notes
from tokenward.stages.training import cuts, fit_stage, model_settings, scored_by
from tokenward.tokens.encode import check_some_left


class RewardStage(TrainingStage):
    """Learn a token reward from ranked lists of any length K (TLM); writes ``model/`` and ``history.jsonl``."""

    name, key, title = "reward", "reward", "the reward"

    def table(self, recipe: Recipe) -> RewardTable:
        """The table ``reward``."""
        return recipe.reward

    def needed(self, run: Run) -> bool:
        """Whether a scorer reads the reward."""
        return reads_model(run, "reward")

    def objective(self, run: Run) -> Objective:
        """An objective over ranked lists."""
        return reward_objective(run)

    def adapter(self, recipe: Recipe) -> tuple[str, dict[str, Any] | None]:
        """None: the whole reward model is trained, or its head alone."""
        return "", None

    def settings(self, run: Run) -> Mapping[str, Any]:
        """The table, and the share of prompts reserved for the eval reward model."""
        reserved = run.recipe.eval_reward
        return {
            "reward": run.recipe.reward.model_dump(exclude={"model"}),
            "tokens": {"context": run.limits.context},
            "eval_reward": None if reserved is None else {"fraction": reserved.fraction},
            **model_settings(run),
        }

    def inputs(self, run: Run) -> Mapping[str, str]:
        """The encoded data, and the model that training starts from."""
        name = reward_start(run)
        return {
            "data": run.done("data").identity,
            "encoded": encoded_fingerprint(run, run.tokenizer_template(name)),
            "model": run.fingerprint_of(name),
        }

    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        """Train."""
        table = run.recipe.reward
        model = fresh_reward(run, cut=cuts(run, folder, table.training))
        template = model.template(run.style)
        train, evaluation = ranked_lists(run, template)
        lists, counts = random_part(run, train, table.fraction, "reward").fitting(run.limits)
        check_some_left(counts)
        run.display.table(
            "ranked lists", ("", "rows"), [(name, str(count)) for name, count in counts.items()]
        )
        say_notes(run, template, counts, lists.store)
        rows, eval_rows = (
            replace(reward_rows(model, part), scratch=run.folder)
            for part in (lists, evaluation.fitting(run.limits)[0])
        )
        facts = fit_stage(
            run,
            folder,
            model,
            self.objective(run),
            rows,
            table.training,
            eval_rows=eval_rows,
            defaults=DEFAULTS,
        )
        warn_of_rewards(model, rows[:CHECKED_REWARDS], run.display.line, **run.passes)
        return {**facts, "list_sizes": sorted(set(rows.sizes.tolist())), **scored_by(run)}

    def checks(self, run: Run) -> Checks:
        """The head and the objective must fit a reward model."""
        return {"reward.head": lambda: head_settings(run), "reward.objective": lambda: self.objective(run)}

    def unpaired_problem(self, run: Run) -> str:
        """A reward model needs ranks."""
        return (
            "a reward is learned from the ranks of several responses. Give ranked responses, or use a scorer that does not read the "
            "reward, such as scores: {scorer: {name: surprisal}}."
        )
