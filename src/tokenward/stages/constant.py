"""Numbers of tokens that are all one number: whatever is made of them says nothing, and no figure shows it."""

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

WITHIN = 1e-6
"""Of the largest size: what is nearer together is one number in float32, some roundings apart."""
LOOKED_AT = 32
"""Rows whose rewards are looked at after a reward was learned."""


def only_number(parts: Iterable[Tensor | np.ndarray]) -> float | None:
    """The one number that all numbers are; None where they differ, or there is none. NaN is no number.

    Args:
        parts: Looked at one after another.
    """
    low, high = float("inf"), -float("inf")
    for part in parts:
        found = np.asarray(part)
        found = found[~np.isnan(found)]
        if len(found):
            low, high = min(low, float(found.min())), max(high, float(found.max()))
    alike = low <= high and high - low <= WITHIN * max(abs(low), abs(high))
    return high if alike else None


def warn_of_scores(run: Run, scorer: Scorer, parts: Iterable[Tensor | np.ndarray]) -> bool:
    """Say so where all scores are one number; returns whether they are. A scorer that reads nothing is not looked at."""
    if not reads_of(scorer) or (number := only_number(parts)) is None:
        return False
    run.display.line(
        f"  warning: every score is {number:.4g}, so no token is told from another and what is selected says nothing. Has the "
        "scored model trained at all? Its stage's history.jsonl has the learning rate of each update"
    )
    return True


def warn_of_stored(run: Run, scorer: Scorer, store: TokenStore) -> None:
    """The same of the scores that a scorer makes of each stored response by itself."""
    if not is_online(scorer) and scope_of_scores(scorer) == "response":
        stored = (shard.record(row) for shard in store.columns() for row in range(len(shard.keys)))
        warn_of_scores(run, scorer, (scores_of(scorer, record) for record in stored))


def warn_of_weights(run: Run, selector: Selector, rows: TokenTable) -> None:
    """Say so where a selection that is meant to tell tokens apart gives all of them one weight."""
    everything = (
        isinstance(selector, TopFraction) and selector.chosen.fraction == selector.rejected.fraction == 1
    )
    if isinstance(selector, KeepAll) or everything:
        return
    number = only_number([np.asarray(rows.columns["weights"].flat)])
    if number is not None:
        run.display.line(
            f"  warning: every token has weight {number:.4g}: the selection tells none from another, and the training is that of "
            "selection: {name: all}. Look at the scores with tokenward data RECIPE, and at what the selection does to them"
        )


def warn_of_rewards(run: Run, model: RewardModel, rows: Iterable[TokenRow]) -> None:
    """Say so where a reward that was learned gives all tokens of some rows one number."""
    table = run.recipe.scores
    found = token_values(model, [*rows], precision=table.precision, tokens_per_batch=table.tokens_per_batch)
    number = only_number(values for row in found for values in row)
    if number is not None:
        run.display.line(
            f"  warning: the reward is {number:.4g} for every token: it has learned nothing that tells one from another. Raise "
            "reward.training's learning_rate, or its number of updates; where reward.head has gain or bias, leave them out"
        )
