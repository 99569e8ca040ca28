"""Add columns of values per token to a table: read from a score store by response key, or computed by a model."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.models.base import TokenModel
from tokenward.scoring.reads import Progress, reads_of, scope_of_scores, scores_of, token_values
from tokenward.scoring.scorers import Combine, Scorer
from tokenward.scoring.steps import Owners
from tokenward.scoring.store import TokenRecord, TokenStore
from tokenward.tokens.store import digest
from tokenward.tokens.table import CHUNK_ROWS, JOINT, Column, TokenTable, own_starts


def with_scores(table: TokenTable, scorer: Scorer, store: TokenStore) -> TokenTable:
    """Add the column ``scores``, computed by a scorer from stored values.

    A scorer that compares responses (``combine`` with a step of scope comparison or dataset) sees all rows at once. If the
    values came from another tokenizer's tokens, there is a column :data:`~tokenward.tokens.table.JOINT` too.
    """
    if store.has_segments:
        table = with_stored(table, store, JOINT, _segment)
    if not isinstance(scorer, Combine) or scope_of_scores(scorer) == "response":
        return with_stored(table, store, "scores", lambda record: scores_of(scorer, record))
    parts = [
        with_scores(table, part.scorer, store).columns["scores"].gathered(table.lengths)
        for part in scorer.members
    ]
    response = torch.repeat_interleave(torch.arange(len(table.lengths)), torch.from_numpy(table.lengths))
    row = torch.repeat_interleave(torch.arange(len(table)), torch.from_numpy(table.sizes))
    best = torch.from_numpy(np.asarray(table.ranks == 0))
    scores = scorer.join(parts, Owners(response, row[response]), best[response])
    return table.with_column("scores", table.own_column([scores]))


def _segment(record: TokenRecord) -> Tensor:
    assert record.segment is not None
    return torch.tensor(record.segment)


def with_read_values(table: TokenTable, scorer: Scorer, store: TokenStore) -> TokenTable:
    """Add the stored values that an online scorer reads in addition to those of the policy.

    The reference's log-probability is left out: it has a column of its own.
    """
    for value in reads_of(scorer):
        if not value.online and value != "reference_logp":
            name = str(value)
            table = with_stored(table, store, name, lambda record, name=name: record.value(name))
    return table


def with_reference(table: TokenTable, store: TokenStore) -> TokenTable:
    """Add the stored log-probabilities of the reference."""
    return with_stored(table, store, "reference_logp", lambda record: record.value("reference_logp"))


def with_stored(
    table: TokenTable, store: TokenStore, name: str, value: Callable[[TokenRecord], Tensor]
) -> TokenTable:
    """Add a column of values of each response's record. Rows may share responses.

    Args:
        table: The rows.
        store: Records of all responses of the table.
        name: Name of the column.
        value: Computes ``[len]`` numbers from a record.

    Raises:
        UserError: A response is not in the store, or has other tokens there because another tokenizer, template or length
            limit was used.
    """
    keys, first, owner = np.unique(table.keys, return_index=True, return_inverse=True)
    _check_same_tokens(table, first, owner)
    lengths = table.lengths[first]
    starts = own_starts(lengths)
    flat = table.room(int(lengths.sum()))
    missing = np.ones(len(keys), bool)
    for place, record, found in _matching_records(store, keys):
        if found != table.digests[first[place]]:
            raise _tokens_differ(table, int(first[place]), record)
        flat[starts[place] : starts[place] + lengths[place]] = value(record).float().numpy()
        missing[place] = False
    if missing.any():
        raise _no_values(table, int(first[missing][0]))
    return table.with_column(name, Column(flat, starts[owner]))


def _check_same_tokens(table: TokenTable, first: np.ndarray, owner: np.ndarray) -> None:
    """Refuse a response with different tokens in two rows: the store has only one record for both."""
    other = np.flatnonzero(table.digests != table.digests[first][owner])
    if len(other):
        raise UserError(
            f"{table.comparison(_row_of(table, int(other[0]))).source}: another row has the same response with different "
            "tokens, but only one set of values can be stored. Remove one of the rows.",
            code="ambiguous-response",
        )


def _row_of(table: TokenTable, response: int) -> int:
    return int(np.searchsorted(table.starts, response, side="right")) - 1


def _matching_records(store: TokenStore, keys: np.ndarray) -> Iterator[tuple[int, TokenRecord, int]]:
    """The records with one of the sorted keys, in the order of the store: index of the key, record, hash of its ids."""
    for shard in store.columns():
        stored = np.array([int(key, 16) for key in shard.keys], np.uint64)
        places = np.searchsorted(keys, stored)
        places[places == len(keys)] = 0
        for row in np.flatnonzero(keys[places] == stored) if len(keys) else ():
            ids = shard.ids[shard.starts[row] : shard.starts[row + 1]]
            yield int(places[row]), shard.record(int(row)), digest(ids)


def _no_values(table: TokenTable, response: int) -> UserError:
    row = _row_of(table, response)
    return UserError(
        f"{table.comparison(row).source}: there are no stored values for response {response - int(table.starts[row]) + 1} of this "
        "row, because they were computed from other data. Compute the scores of this data again.",
        code="missing-response",
    )


def _tokens_differ(table: TokenTable, response: int, record: TokenRecord) -> UserError:
    row = table[_row_of(table, response)]
    return UserError(
        f"{row.comparison.source}: the stored values are not those of this model's tokens: a response has "
        f"{int(table.lengths[response])} tokens here and {len(record.ids)} there, or other ids. Oracle and policy must share "
        "the tokenizer, template and length limits. Use models of one family, or compute the scores again.",
        code="tokenizer-mismatch",
    )


def compute_column(
    table: TokenTable,
    model: TokenModel,
    *,
    precision: str,
    tokens_per_batch: int,
    progress: Progress | None = None,
    shared: bool = False,
) -> Column:
    """A column of a model's values, computed for some rows at a time; arguments as in :func:`token_values`."""
    settings: dict[str, Any] = {
        "precision": precision, "tokens_per_batch": tokens_per_batch, "progress": progress, "shared": shared,
    }  # fmt: skip

    def parts() -> Iterator[Tensor]:
        for first in range(0, len(table), CHUNK_ROWS):
            rows = [table[number] for number in range(first, min(first + CHUNK_ROWS, len(table)))]
            found = token_values(model, rows, **settings)
            yield from (values for row in found for values in row)

    return table.own_column(parts())
