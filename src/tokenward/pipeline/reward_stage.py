"""The reward stage of a run on comparisons: a token reward learned from the ranks in the data (TLM)."""

from collections.abc import Sequence
from typing import Any

from tokenward.artifacts import Manifest
from tokenward.data import fraction, split
from tokenward.errors import UserError
from tokenward.models.reward import RewardModel
from tokenward.pipeline.context import Run
from tokenward.pipeline.data import encode_set, read_comparisons
from tokenward.pipeline.fit import fit
from tokenward.pipeline.guidance_stage import fresh_reward
from tokenward.pipeline.reward_learning import DEFAULTS, reward_objective
from tokenward.pipeline.train_stages import model_settings, scored_by
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.segments import with_segments
from tokenward.types import Comparison


def train_reward(run: Run) -> Manifest:
    """Learn a token reward from whole ranked lists, of any length K each; writes ``model/`` and ``history.jsonl``."""
    table = run.recipe.reward
    name = table.model or run.start_model
    settings: dict[str, Any] = {
        "reward": table.model_dump(exclude={"model"}),
        "tokens": {**run.recipe.tokens.model_dump(), "context": run.limits.context},
        "referee": None if run.recipe.referee is None else run.recipe.referee.fraction,
        **model_settings(run),
    }
    inputs = {"data": run.done("data").fingerprint, "model": run.fingerprint_of(name)}
    with run.stage("reward", settings, inputs) as stage:
        if not stage.done:
            model = fresh_reward(run)
            train, held_out = ranked_sets(run)
            train = fraction(train, table.fraction, run.recipe.seed, "reward")
            rows = _rows(run, model, train, show="ranked lists")
            facts = fit(
                run,
                stage,
                model,
                reward_objective(run),
                rows,
                table.training,
                held_out=_rows(run, model, held_out),
                defaults=DEFAULTS,
            )
            sizes = sorted({len(row.encoded.responses) for row in rows})
            stage.complete(**facts, list_sizes=sizes, **scored_by(run))
    return run.done("reward")


def ranked_sets(run: Run) -> tuple[list[Comparison], list[Comparison]]:
    """Whole ranked lists to learn from and to judge by; those of the referee's prompts are in neither."""
    train, held_out = (
        list(read_comparisons(run.path("data") / f"{part}.jsonl")) for part in ("train", "held_out")
    )
    if run.recipe.referee is not None:
        train = split(train, held_out=run.recipe.referee.fraction, seed=run.recipe.seed + 1).train
    return train, held_out


def _rows(
    run: Run, model: RewardModel, comparisons: Sequence[Comparison], *, show: str = ""
) -> list[TokenRow]:
    unit = model.settings.unit
    missing = next((row for row in comparisons if row.spans is None), None)
    if unit == "spans" and missing is not None:
        raise UserError(
            f"{missing.source}: reward.head.unit is spans, and this row has none. Give the data a column spans, or write "
            "unit: sentence, word or token."
        )
    template = model.template(run.recipe.tokens.template)
    encoded = encode_set(run, comparisons, template, show=show, may_be_empty=not show).rows
    return [with_segments(unit, model.tokenizer, TokenRow(encoded=row)) for row in encoded]
