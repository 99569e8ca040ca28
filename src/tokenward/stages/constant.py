"""Warnings when all scores, rewards or weights are one number: the selection is then meaningless, and no figure shows it."""

from collections.abc import Iterable

import numpy as np
from torch import Tensor

from tokenward.models.reward import RewardModel
from tokenward.scoring.join import scores_of
from tokenward.scoring.reads import is_online, reads_of, scope_of_scores, token_values
from tokenward.scoring.scorers import Scorer
from tokenward.scoring.store import TokenStore
from tokenward.selection import KeepAll, Selector, TopFraction
from tokenward.stages.run import Run
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.table import TokenTable

_TOLERANCE = 1e-6  # relative to the largest size: a few roundings of float32
LOOKED_AT = 32
"""Number of rows whose rewards are checked after a reward is learned."""


def only_number(parts: Iterable[Tensor | np.ndarray]) -> float | None:
    """The number that all entries of all parts equal; None if they differ or there is none. Ignores NaN."""
    low, high = float("inf"), -float("inf")
    for part in parts:
        found = np.asarray(part)
        found = found[~np.isnan(found)]
        if len(found):
            low, high = min(low, float(found.min())), max(high, float(found.max()))
    return high if low <= high and high - low <= _TOLERANCE * max(abs(low), abs(high)) else None


def warn_of_scores(run: Run, scorer: Scorer, parts: Iterable[Tensor | np.ndarray]) -> bool:
    """Warn if all scores are one number; returns whether they are. A scorer that reads nothing is not checked."""
    if not reads_of(scorer) or (number := only_number(parts)) is None:
        return False
    run.display.line(
        f"  warning: every score is {number:.4g}, so the selection cannot tell tokens apart. Check that the scored model has "
        "trained: the history.jsonl of its stage has the learning rate of each update"
    )
    return True


def warn_of_stored(run: Run, scorer: Scorer, store: TokenStore) -> None:
    """As :func:`warn_of_scores`, for a scorer that scores each stored response by itself."""
    if not is_online(scorer) and scope_of_scores(scorer) == "response":
        stored = (shard.record(row) for shard in store.columns() for row in range(len(shard.keys)))
        warn_of_scores(run, scorer, (scores_of(scorer, record) for record in stored))


def warn_of_weights(run: Run, selector: Selector, rows: TokenTable) -> None:
    """Warn if a selector that should tell tokens apart gives all of them one weight."""
    fractions = (
        {selector.chosen.fraction, selector.rejected.fraction} if isinstance(selector, TopFraction) else set()
    )
    if isinstance(selector, KeepAll) or fractions == {1}:
        return
    number = only_number([np.asarray(rows.columns["weights"].flat)])
    if number is not None:
        run.display.line(
            f"  warning: every token has weight {number:.4g}, so training is the same as with selection: {{name: all}}. Look at "
            "the scores with tokenward data RECIPE, and compare them with the settings of the selection"
        )


def warn_of_rewards(run: Run, model: RewardModel, rows: Iterable[TokenRow]) -> None:
    """Warn if a learned reward gives all tokens of some rows one number."""
    found = token_values(model, [*rows], **run.passes)
    number = only_number(values for row in found for values in row)
    if number is not None:
        run.display.line(
            f"  warning: the reward is {number:.4g} for every token, so it has learned nothing. Raise the learning_rate of "
            "reward.training or its number of updates, and leave out gain and bias of reward.head"
        )
