"""The reward stage of a run on comparisons: a token reward learned from the ranks in the data (TLM)."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from tokenward.artifacts import StageFolder
from tokenward.config import Recipe, RewardTable
from tokenward.errors import UserError
from tokenward.models.reward import RewardModel
from tokenward.objectives import Objective
from tokenward.stages.auxiliary import reads_model
from tokenward.stages.base import Checks, TrainingStage
from tokenward.stages.constant import LOOKED_AT, warn_of_rewards
from tokenward.stages.online import fresh_reward, reward_settings, reward_start
from tokenward.stages.reward_learning import DEFAULTS, reward_objective
from tokenward.stages.run import Run
from tokenward.stages.tables import encoded_fingerprint, random_part, ranked_lists, say_notes
from tokenward.stages.training import fit_stage, model_settings, scored_by
from tokenward.tokens.encode import check_some_left
from tokenward.tokens.segments import with_segments
from tokenward.tokens.table import TokenTable


class RewardStage(TrainingStage):
    """Learn a token reward from whole ranked lists, of any length K each (TLM); writes ``model/`` and ``history.jsonl``."""

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
        """None: the reward model trains whole, or its head alone."""
        return "", None

    def settings(self, run: Run) -> Mapping[str, Any]:
        """Its table, and which prompts are left to the eval reward model."""
        apart = run.recipe.eval_reward
        return {
            "reward": run.recipe.reward.model_dump(exclude={"model"}),
            "tokens": {"context": run.limits.context},
            "eval_reward": None if apart is None else {"fraction": apart.fraction},
            **model_settings(run),
        }

    def inputs(self, run: Run) -> Mapping[str, str]:
        """The data as ids, and the model that it starts from."""
        name = reward_start(run)
        return {
            "data": run.done("data").fingerprint,
            "encoded": encoded_fingerprint(run, run.tokenizer_template(name)),
            "model": run.fingerprint_of(name),
        }

    def make(self, run: Run, folder: StageFolder) -> Mapping[str, Any]:
        """Train."""
        table, model = run.recipe.reward, fresh_reward(run)
        train, eval_rows = ranked_lists(run, model.template(run.style))
        rows = _rows(run, model, random_part(run, train, table.fraction, "reward"), show="ranked lists")
        facts = fit_stage(
            run,
            folder,
            model,
            self.objective(run),
            rows,
            table.training,
            eval_rows=_rows(run, model, eval_rows),
            defaults=DEFAULTS,
        )
        warn_of_rewards(run, model, [rows[place] for place in range(min(LOOKED_AT, len(rows)))])
        return {**facts, "list_sizes": sorted(set(rows.sizes.tolist())), **scored_by(run)}

    def checks(self, run: Run) -> Checks:
        """A head and an objective that fit a reward."""
        return {"reward.head": lambda: reward_settings(run), "reward.objective": lambda: self.objective(run)}

    def unpaired_problem(self, run: Run) -> str:
        """It needs ranks."""
        return (
            "a reward is learned from ranks among several responses. Give ranked responses, or write a scorer that reads no "
            "reward, such as scores: {scorer: {name: surprisal}}."
        )


def _rows(run: Run, model: RewardModel, lists: TokenTable, *, show: str = "") -> TokenTable:
    """Lists that fit the limits, with the segments that the reward pools over."""
    unit = model.settings.unit
    rows = (lists.comparison(number) for number in range(len(lists)))
    missing = next((row for row in rows if row.spans is None), None) if unit == "spans" else None
    if missing is not None:
        raise UserError(
            f"{missing.source}: reward.head.unit is spans, and this row has none. Give the data a column spans, or write "
            "unit: sentence, word or token."
        )
    found, counts = lists.fitting(run.limits)
    if show:
        check_some_left(counts)
        run.display.table(show, ("", "rows"), [(name, str(count)) for name, count in counts.items()])
        say_notes(run, model.template(run.style), counts, lists.store)
    change = None if unit == "token" else partial(with_segments, unit, model.tokenizer)
    return replace(found, scratch=run.folder, change=change)
