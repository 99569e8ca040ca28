"""Warnings about scores, weights and rewards that are the same number for every token, so that they carry no information."""

from collections.abc import Callable, Iterable

import numpy as np
from torch import Tensor

from tokenward.models.reward import RewardModel
from tokenward.scoring.join import scores_of
from tokenward.scoring.reads import is_online, reads_of, scope_of_scores, token_values
from tokenward.scoring.scorers import Scorer
from tokenward.scoring.store import TokenStore
from tokenward.selection import KeepAll, Selector, TopFraction
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.table import TokenTable

Say = Callable[[str], object]
"""Shows a line to the user."""

ROUNDING = 1e-6
"""Largest relative difference of numbers that count as one: a few roundings of float32."""
CHECKED_REWARDS = 32
"""Rows whose rewards are checked after a reward model was trained."""


def constant_value(parts: Iterable[Tensor | np.ndarray]) -> float | None:
    """The number that all numbers are equal to, or None if they differ or there are none. NaN is ignored.

    Reads no further than the first number that differs.
    """
    low, high = float("inf"), -float("inf")
    for part in parts:
        found = np.asarray(part)
        found = found[~np.isnan(found)]
        if len(found):
            low, high = min(low, float(found.min())), max(high, float(found.max()))
            if high - low > ROUNDING * max(abs(low), abs(high)):
                return None  # further numbers cannot make them equal: the quotient of both sides only grows
    return high if low <= high and high - low <= ROUNDING * max(abs(low), abs(high)) else None


def warn_of_scores(scorer: Scorer, parts: Iterable[Tensor | np.ndarray], say: Say) -> bool:
    """Warn if all scores are equal, and return whether they are. A scorer that reads nothing may be constant on purpose."""
    if not reads_of(scorer) or (number := constant_value(parts)) is None:
        return False
    say(
        f"  warning: every score is {number:.4g}, so the scores do not tell tokens apart and the selection is arbitrary. Check that "
        "the model behind the scores was trained: history.jsonl beside it has the learning rate of each update"
    )
    return True


def warn_of_stored(scorer: Scorer, store: TokenStore, say: Say) -> None:
    """Warn if all scores of stored responses are equal, for a scorer that scores each response by itself."""
    if not is_online(scorer) and scope_of_scores(scorer) == "response":
        stored = (shard.record(row) for shard in store.columns() for row in range(len(shard.keys)))
        warn_of_scores(scorer, (scores_of(scorer, record) for record in stored), say)


def warn_of_weights(selector: Selector, rows: TokenTable, say: Say) -> None:
    """Warn if a selector gives all tokens the same weight although its settings ask for a selection."""
    everything = (
        isinstance(selector, TopFraction) and selector.chosen.fraction == selector.rejected.fraction == 1
    )
    if isinstance(selector, KeepAll) or everything:
        return
    number = constant_value([np.asarray(rows.columns["weights"].flat)])
    if number is not None:
        say(
            f"  warning: every token has weight {number:.4g}, so training is the same as without a selection. Check the scores, and "
            "what the selector makes of them"
        )


def warn_of_rewards(
    model: RewardModel, rows: Iterable[TokenRow], say: Say, *, precision: str, tokens_per_batch: int
) -> None:
    """Warn if a trained reward model gives all tokens of some rows the same reward."""
    found = token_values(model, [*rows], precision=precision, tokens_per_batch=tokens_per_batch)
    number = constant_value(values for row in found for values in row)
    if number is not None:
        say(
            f"  warning: the reward is {number:.4g} for every token, so it has not learned to tell tokens apart. Raise its "
            "learning_rate or the number of updates; if the head's gain or bias was set, try the defaults"
        )
