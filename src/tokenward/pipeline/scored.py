"""Rows with what the recipe's scorer makes of the score store, or with what it needs of it in the step."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from tokenward.pipeline.context import Run
from tokenward.pipeline.rows import VALUE, Column, LazyRows, own_starts, scratch
from tokenward.pipeline.values import gathered, scorer_of, scores_of, tokens_of, with_stored
from tokenward.scoring.reads import reads_of
from tokenward.scoring.scorers import Combine, Scorer
from tokenward.scoring.steps import Owners
from tokenward.scoring.store import TokenStore
from tokenward.tokens.rows import TokenRow


def scored_rows(run: Run, rows: Sequence[TokenRow]) -> LazyRows:
    """Rows with the scores of the score store, by the recipe's scorer."""
    return rows_scored_by(run, scorer_of(run), TokenStore(run.path("scores")), rows)


def rows_scored_by(run: Run, scorer: Scorer, store: TokenStore, rows: Sequence[TokenRow]) -> LazyRows:
    """Rows with the scores that a scorer makes of a store.

    A scorer that compares responses (``combine`` with a step at scope comparison or dataset) sees all rows at once.
    """
    if not isinstance(scorer, Combine) or scorer.scope == "response":
        return _each_scored(run, scorer, store, rows)
    lazy = rows if isinstance(rows, LazyRows) else LazyRows(encoded=[row.encoded for row in rows])
    parts = [_scores(rows_scored_by(run, part.scorer, store, lazy)) for part in scorer.made]
    tokens = tokens_of(lazy.responses, parts[0])
    owners = Owners(tokens.response, tokens.comparison[tokens.response])
    found = scorer.join(parts, owners, (tokens.rank == 0)[tokens.response]).numpy()
    flat = scratch(run.folder, len(found))
    flat[:] = found
    return lazy.with_column("scores", Column(flat, own_starts(lazy.responses.lengths)))


def _each_scored(run: Run, scorer: Scorer, store: TokenStore, rows: Sequence[TokenRow]) -> LazyRows:
    return with_stored(run, rows, store, "scores", lambda record: scores_of(scorer, [record])[0])


def _scores(rows: LazyRows) -> Tensor:
    flat, starts = rows.columns["scores"]
    return gathered(np.asarray(flat), starts, rows.responses.lengths)


def with_values(run: Run, rows: LazyRows) -> LazyRows:
    """Rows with the stored values that an online scorer reads beside those of the policy.

    The reference's log-probability is not among them: a row has a place of its own for it.
    """
    store = TokenStore(run.path("scores"))
    for value in reads_of(scorer_of(run)):
        if not value.online and value != "reference_logp":
            name = str(value)
            rows = with_stored(
                run, rows, store, f"{VALUE}{name}", lambda record, name=name: record.value(name)
            )
    return rows
