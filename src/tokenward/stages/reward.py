"""The reward stage of a run on comparisons: a token reward learned from the ranks in the data (TLM)."""

from dataclasses import replace
from functools import partial
from typing import Any

from tokenward.artifacts import Manifest
from tokenward.errors import UserError
from tokenward.models.reward import RewardModel
from tokenward.stages.constant import LOOKED_AT, warn_of_rewards
from tokenward.stages.fit import fit
from tokenward.stages.online import fresh_reward, reward_start
from tokenward.stages.reward_learning import DEFAULTS, reward_objective
from tokenward.stages.run import Run
from tokenward.stages.tables import encoded_fingerprint, random_part, ranked_lists, say_notes
from tokenward.stages.training import model_settings, scored_by
from tokenward.tokens.encode import check_some_left
from tokenward.tokens.segments import with_segments
from tokenward.tokens.table import TokenTable


def train_reward(run: Run) -> Manifest:
    """Learn a token reward from whole ranked lists, of any length K each; writes ``model/`` and ``history.jsonl``."""
    table = run.recipe.reward
    name = reward_start(run)
    settings: dict[str, Any] = {
        "reward": table.model_dump(exclude={"model"}),
        "context": run.limits.context,
        "eval_reward": None if run.recipe.eval_reward is None else run.recipe.eval_reward.fraction,
        **model_settings(run),
    }
    template = run.tokenizer_template(name)
    inputs = {
        "data": run.done("data").fingerprint,
        "encoded": encoded_fingerprint(run, template),
        "model": run.fingerprint_of(name),
    }
    with run.stage("reward", settings, inputs) as stage:
        if not stage.done:
            model = fresh_reward(run)
            train, eval_rows = ranked_lists(run, template)
            train = random_part(run, train, table.fraction, "reward")
            rows = _rows(run, model, train, show="ranked lists")
            facts = fit(
                run,
                stage,
                model,
                reward_objective(run),
                rows,
                table.training,
                eval_rows=_rows(run, model, eval_rows),
                defaults=DEFAULTS,
            )
            warn_of_rewards(run, model, [rows[place] for place in range(min(LOOKED_AT, len(rows)))])
            sizes = sorted({len(row.responses) for row in rows})
            stage.complete(**facts, list_sizes=sizes, **scored_by(run))
    return run.done("reward")


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
