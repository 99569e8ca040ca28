"""The reward stage of a run on comparisons: a token reward learned from the ranks in the data (TLM)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from tokenward.artifacts import Manifest
from tokenward.data.choice import Choice
from tokenward.errors import UserError
from tokenward.models.reward import RewardModel
from tokenward.pipeline.constant import LOOKED_AT, warn_of_rewards
from tokenward.pipeline.context import Run
from tokenward.pipeline.data import (
    comparison_file,
    encode_set,
    random_part,
    rows_of_eval_reward,
    token_settings,
    whole_comparisons,
)
from tokenward.pipeline.fit import fit
from tokenward.pipeline.online_stage import fresh_reward, reward_start
from tokenward.pipeline.reward_learning import DEFAULTS, reward_objective
from tokenward.pipeline.rows import LazyRows, Mapped
from tokenward.pipeline.train_stages import model_settings, scored_by
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.segments import with_segments


def train_reward(run: Run) -> Manifest:
    """Learn a token reward from whole ranked lists, of any length K each; writes ``model/`` and ``history.jsonl``."""
    table = run.recipe.reward
    name = reward_start(run)
    settings: dict[str, Any] = {
        "reward": table.model_dump(exclude={"model"}),
        "tokens": {**token_settings(run), "context": run.limits.context},
        "eval_reward": None if run.recipe.eval_reward is None else run.recipe.eval_reward.fraction,
        **model_settings(run),
    }
    inputs = {"data": run.done("data").fingerprint, "model": run.fingerprint_of(name)}
    with run.stage("reward", settings, inputs) as stage:
        if not stage.done:
            model = fresh_reward(run)
            train, eval_rows = ranked_sets(run)
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
            sizes = sorted({len(row.encoded.responses) for row in rows})
            stage.complete(**facts, list_sizes=sizes, **scored_by(run))
    return run.done("reward")


def ranked_sets(run: Run) -> tuple[Choice, Choice]:
    """Whole ranked lists to learn from and to judge by; those of the eval reward model's prompts are in neither."""
    train, eval_rows = (whole_comparisons(comparison_file(run, part)) for part in ("train", "eval"))
    return train.choose(np.flatnonzero(~rows_of_eval_reward(run, train.file))), eval_rows


def _rows(run: Run, model: RewardModel, comparisons: Choice, *, show: str = "") -> Sequence[TokenRow]:
    unit = model.settings.unit
    missing = next((row for row in comparisons if row.spans is None), None) if unit == "spans" else None
    if missing is not None:
        raise UserError(
            f"{missing.source}: reward.head.unit is spans, and this row has none. Give the data a column spans, or write "
            "unit: sentence, word or token."
        )
    template = model.template(run.style)
    encoded = encode_set(run, comparisons, template, show=show, may_be_empty=not show).rows
    rows = LazyRows(encoded=encoded)
    return rows if unit == "token" else Mapped(rows, partial(with_segments, unit, model.tokenizer))
