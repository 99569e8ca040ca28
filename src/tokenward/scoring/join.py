"""Values per token onto a table: read from a score store by the responses' keys, or computed by a model."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.models.base import TokenModel
from tokenward.plugins import name_of
from tokenward.scoring.reads import Progress, answer_of, numbers_of, reads_of, scope_of_scores, token_values
from tokenward.scoring.scorers import Combine, Scorer
from tokenward.scoring.steps import Owners
from tokenward.scoring.store import TokenRecord, TokenStore
from tokenward.tokens.store import digest
from tokenward.tokens.table import CHUNK_ROWS, Column, TokenTable, own_starts


def scores_of(scorer: Scorer, record: TokenRecord) -> Tensor:
    """Scores of a stored response.  -> [len] float32

    Raises:
        UserError: a custom scorer returned anything but one number per token.
    """
    values = numbers_of("scorer", scorer, answer_of(scorer, record))
    if values.shape != (len(record.ids),):
        raise UserError(
            f"the scorer {name_of(scorer)} gave {tuple(values.shape)} numbers for a response of {len(record.ids)} tokens. "
            "It must give one per token."
        )
    return values


def scored(table: TokenTable, scorer: Scorer, store: TokenStore) -> TokenTable:
    """A table with the scores that a scorer makes of a store, as its column ``scores``.

    A scorer that compares responses (``combine`` with a step of scope comparison or dataset) sees all rows at once.
    """
    if not isinstance(scorer, Combine) or scope_of_scores(scorer) == "response":
        return with_stored(table, store, "scores", lambda record: scores_of(scorer, record))
    parts = [
        scored(table, part.scorer, store).columns["scores"].gathered(table.lengths) for part in scorer.made
    ]
    response = torch.repeat_interleave(torch.arange(len(table.lengths)), torch.from_numpy(table.lengths))
    row = torch.repeat_interleave(torch.arange(len(table)), torch.from_numpy(table.sizes))
    best = torch.from_numpy(np.asarray(table.ranks == 0))
    found = scorer.join(parts, Owners(response, row[response]), best[response])
    return table.with_column("scores", table.own_column([found]))


def with_read_values(table: TokenTable, scorer: Scorer, store: TokenStore) -> TokenTable:
    """A table with the stored values that an online scorer reads beside those of the policy.

    The reference's log-probability is not one of them: it has a column of its own.
    """
    for value in reads_of(scorer):
        if not value.online and value != "reference_logp":
            name = str(value)
            table = with_stored(table, store, name, lambda record, name=name: record.value(name))
    return table


def with_reference(table: TokenTable, store: TokenStore) -> TokenTable:
    """A table with the stored log-probabilities of the reference."""
    return with_stored(table, store, "reference_logp", lambda record: record.value("reference_logp"))


def with_stored(
    table: TokenTable, store: TokenStore, name: str, value: Callable[[TokenRecord], Tensor]
) -> TokenTable:
    """A table with a value of each of its responses. Rows may share responses.

    Raises:
        UserError: the store lacks one, or holds other tokens: another tokenizer, template or limit made it.
    """
    keys, first, owner = np.unique(table.keys, return_index=True, return_inverse=True)
    _check_alike(table, first, owner)
    lengths = table.lengths[first]
    starts = own_starts(lengths)
    flat = table.room(int(lengths.sum()))
    missing = np.ones(len(keys), bool)
    for place, record, found in _records(store, keys):
        if found != table.digests[first[place]]:
            raise _other_tokens(table, store, int(first[place]), record)
        flat[starts[place] : starts[place] + lengths[place]] = value(record).float().numpy()
        missing[place] = False
    if missing.any():
        raise store.lacks(f"{int(keys[missing][0]):016x}")
    return table.with_column(name, Column(flat, starts[owner]))


def _check_alike(table: TokenTable, first: np.ndarray, owner: np.ndarray) -> None:
    """Refuse a response that has other tokens in one row than in another: they share one record of the store."""
    other = np.flatnonzero(table.digests != table.digests[first][owner])
    if len(other):
        raise UserError(
            f"{table.comparison(_row_of(table, int(other[0]))).source}: another row has a response of this row with other "
            "tokens, so its stored values belong to one of the two. Take one of the rows out."
        )


def _row_of(table: TokenTable, response: int) -> int:
    return int(np.searchsorted(table.starts, response, side="right")) - 1


def _records(store: TokenStore, keys: np.ndarray) -> Iterator[tuple[int, TokenRecord, int]]:
    """What a store has of sorted keys, in its own order: the key's place, the record, and the hash of its ids."""
    for shard in store.columns():
        stored = np.array([int(key, 16) for key in shard.keys], np.uint64)
        places = np.searchsorted(keys, stored)
        places[places == len(keys)] = 0
        for row in np.flatnonzero(keys[places] == stored) if len(keys) else ():
            ids = shard.ids[shard.starts[row] : shard.starts[row + 1]]
            yield int(places[row]), shard.record(int(row)), digest(ids)


def _other_tokens(table: TokenTable, store: TokenStore, response: int, record: TokenRecord) -> UserError:
    row = table[_row_of(table, response)]
    return UserError(
        f"the tokens in {store.folder} are not those of this model: {row.comparison.source} has "
        f"{int(table.lengths[response])} tokens here and {len(record.ids)} there, or other ids. Oracle and policy must share "
        "a tokenizer and the tokens table; use the same family of models, or score again."
    )


def computed(
    table: TokenTable,
    model: TokenModel,
    *,
    precision: str,
    tokens_per_batch: int,
    progress: Progress | None = None,
) -> Column:
    """One number of a model for each token of a table, computed some rows at a time."""

    def parts() -> Iterator[Tensor]:
        for first in range(0, len(table), CHUNK_ROWS):
            rows: Sequence = [table[n] for n in range(first, min(first + CHUNK_ROWS, len(table)))]
            found = token_values(
                model, rows, precision=precision, tokens_per_batch=tokens_per_batch, progress=progress
            )
            yield from (value for row in found for value in row)

    return table.own_column(parts())
