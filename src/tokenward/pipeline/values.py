"""Stored values onto rows: reference log-probabilities, scores, weights."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tokenward.config import Named
from tokenward.errors import UserError
from tokenward.models.base import TokenModel
from tokenward.pipeline.context import Run
from tokenward.pipeline.rows import Column, LazyRows, Responses, own_starts, responses_of, scratch
from tokenward.plugins import build, check_call, name_of
from tokenward.scoring.reads import answer_of
from tokenward.scoring.scorers import SCORERS, Scorer, check_scope, seeded
from tokenward.scoring.store import TokenRecord, TokenStore
from tokenward.scoring.values import Progress, token_values
from tokenward.selection import ScoredTokens, Selector, Transform, is_signed, scope_of, unit_of
from tokenward.tokens.encode import Encoded
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.segments import Unit, with_segments
from tokenward.tokens.shards import digest

CHUNK_ROWS = 1024
"""Rows that are in memory at once where a stage looks at all of them."""


def scorer_of(run: Run) -> Scorer:
    """The scorer that the recipe names for the scores."""
    return made_scorer(run.recipe.scores.scorer, run.recipe.seed)


def made_scorer(table: Named, seed: int = 0) -> Scorer:
    """The scorer that a table of a recipe names; the seed of one that draws is the recipe's unless it has one.

    Raises:
        UserError: there is none, its settings are wrong, or it says that it must see several responses at once.
    """
    arguments = seeded({"name": table.name, **table.arguments}, seed)
    del arguments["name"]
    scorer = build("scorer", table.name, arguments, SCORERS)
    check_call("scorer", table.name, scorer, ("record",))
    check_scope(scorer)
    return scorer


def with_reference(run: Run, rows: Sequence[TokenRow]) -> LazyRows:
    """Rows with the reference log-probabilities of the reference stage."""
    store = TokenStore(run.path("reference"))
    return with_stored(run, rows, store, "reference_logp", lambda record: record.value("reference_logp"))


def scores_of(scorer: Scorer, records: Sequence[TokenRecord]) -> list[Tensor]:
    """Scores of stored responses.  [n] each

    Raises:
        UserError: a scorer of one's own returned anything but one number per token.
    """
    scores = []
    for record in records:
        values = _numbers("scorer", scorer, answer_of(scorer, record))
        if values.shape != (len(record.ids),):
            raise UserError(
                f"the scorer {name_of(scorer)} gave {tuple(values.shape)} numbers for a response of {len(record.ids)} tokens. "
                "It must give one per token."
            )
        scores.append(values)
    return scores


def _numbers(kind: str, made: Scorer | Selector, returned: object) -> Tensor:
    """What a scorer or selector returned, a list or an array too, as float32."""
    try:
        return torch.as_tensor(returned, dtype=torch.float32)
    except (
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:  # torch raises each of them for one value or another
        raise UserError(
            f"the {kind} {name_of(made)} returned a {type(returned).__name__} that is no list of numbers ({error}). Return a tensor, an "
            "array or a list with one number per token."
        ) from error


def with_stored(
    run: Run, rows: Sequence[TokenRow], store: TokenStore, name: str, value: Callable[[TokenRecord], Tensor]
) -> LazyRows:
    """Rows with a value of each of their responses, which may be the responses of several rows.

    Raises:
        UserError: the store lacks one, or holds other tokens: another tokenizer, template or limit made it.
    """
    lazy = rows if isinstance(rows, LazyRows) else LazyRows(encoded=[row.encoded for row in rows])
    known = lazy.responses
    keys, first, owner = np.unique(known.keys, return_index=True, return_inverse=True)
    _check_alike(lazy, known.digests, first, owner)
    lengths = known.lengths[first]
    starts = own_starts(lengths)
    flat = scratch(run.folder, int(lengths.sum()))
    missing = np.ones(len(keys), bool)
    for place, record, found in _records(store, keys):
        if found != known.digests[first[place]]:
            raise _other_tokens(store, lazy, int(first[place]), record)
        flat[starts[place] : starts[place] + lengths[place]] = value(record).float().numpy()
        missing[place] = False
    if missing.any():
        raise store.lacks(f"{int(keys[missing][0]):016x}")
    return lazy.with_column(name, Column(flat, starts[owner]))


def _check_alike(rows: LazyRows, digests: np.ndarray, first: np.ndarray, owner: np.ndarray) -> None:
    """Refuse a response that has other tokens in one row than in another: they share one record of the store."""
    other = np.flatnonzero(digests != digests[first][owner])
    if len(other):
        row = int(np.searchsorted(rows.responses.starts, other[0], side="right")) - 1
        raise UserError(
            f"{rows.encoded[row].comparison.source}: a response of this row stands in another row too, with other tokens, so its "
            "stored values belong to one of the two. Take one of the rows out."
        )


def _records(store: TokenStore, keys: np.ndarray) -> Iterator[tuple[int, TokenRecord, int]]:
    """What a store has of sorted keys, in its own order: the key's place, the record, and the hash of its ids."""
    for shard in store.columns():
        stored = np.array([int(key, 16) for key in shard.keys], np.uint64)
        places = np.searchsorted(keys, stored)
        places[places == len(keys)] = 0
        for row in np.flatnonzero(keys[places] == stored) if len(keys) else ():
            ids = shard.ids[shard.starts[row] : shard.starts[row + 1]]
            yield int(places[row]), shard.record(int(row)), digest(ids)


def _other_tokens(store: TokenStore, rows: LazyRows, response: int, record: TokenRecord) -> UserError:
    starts = rows.responses.starts
    number = int(np.searchsorted(starts, response, side="right")) - 1
    encoded = rows.encoded[number]
    ids = encoded.responses[response - int(starts[number])]
    return UserError(
        f"the tokens in {store.folder} are not those of this model: {encoded.comparison.source} has "
        f"{len(ids)} tokens here and {len(record.ids)} there, or other ids. Oracle and policy must share a "
        "tokenizer and the tokens table; use the same family of models, or score again."
    )


def computed_values(
    run: Run, model: TokenModel, rows: Sequence[Encoded], *, progress: Progress | None = None
) -> Column:
    """One number of a model for each token of rows, computed some rows at a time."""
    known = responses_of(rows)
    starts = own_starts(known.lengths)
    flat = scratch(run.folder, int(known.lengths.sum()))
    table, done = run.recipe.scores, 0
    for first in range(0, len(rows), CHUNK_ROWS):
        group = [
            TokenRow(encoded=rows[number]) for number in range(first, min(first + CHUNK_ROWS, len(rows)))
        ]
        found = token_values(
            model,
            group,
            precision=table.precision,
            tokens_per_batch=table.tokens_per_batch,
            progress=progress,
        )
        for value in (value for row in found for value in row):
            flat[done : done + len(value)] = value.numpy()
            done += len(value)
    return Column(flat, starts)


def weigh_all(
    run: Run, selector: Selector, rows: LazyRows, tokenizer: PreTrainedTokenizerBase | None = None
) -> LazyRows:
    """Rows with the weights that a selector gives to their scores, some rows at a time where its scope allows.

    Args:
        run: The run.
        selector: Gives the weights.
        rows: With scores.
        tokenizer: Of the rows' ids, for a selector that needs to know words, sentences or spans.
    """
    known, scores = rows.responses, rows.columns["scores"]
    starts = own_starts(known.lengths)
    flat = scratch(run.folder, int(known.lengths.sum()))
    step = max(len(rows), 1) if scope_of(selector) in ("dataset", "batch") else CHUNK_ROWS
    done = 0
    for first in range(0, len(rows), step):
        last = min(first + step, len(rows))
        group = known.of_rows(first, last)
        mine = scores.starts[int(known.starts[first]) : int(known.starts[last])]
        tokens = tokens_of(group, gathered(scores.flat, mine, group.lengths))
        if unit_of(selector):
            assert tokenizer is not None
            segmented = segment_numbers(rows.encoded[first:last], unit_of(selector), tokenizer)
            tokens = tokens._replace(segment=segmented)
        weights = _weights(selector, tokens)
        flat[done : done + len(weights)] = weights.float().numpy()
        done += len(weights)
    return rows.with_column("weights", Column(flat, starts))


def segment_numbers(rows: Sequence[Encoded], unit: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Which word, sentence or span each response token is in, numbered in order over all rows.  -> [n]"""
    parts, before = [], 0
    for encoded in rows:
        found = with_segments(cast(Unit, unit), tokenizer, TokenRow(encoded=encoded)).segments
        for part in found or ():
            numbers = torch.unique_consecutive(part, return_inverse=True)[1]
            parts.append(numbers + before)
            before += int(numbers[-1]) + 1
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)


def gathered(flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Tensor:
    """The numbers of some responses, end to end."""
    found = np.empty(int(lengths.sum()), np.float32)
    done = 0
    for start, size in zip(starts.tolist(), lengths.tolist(), strict=True):
        found[done : done + size] = flat[start : start + size]
        done += size
    return torch.from_numpy(found)


def _weights(selector: Selector, tokens: ScoredTokens) -> Tensor:
    weights = _numbers("selector", selector, selector(tokens))
    least = "" if is_signed(selector) else " >= 0"
    if (
        weights.shape != tokens.scores.shape
        or bool((weights < 0).any() and least)
        or not bool(weights.isfinite().all())
    ):
        raise UserError(
            f"the selector {name_of(selector)} must give one finite weight{least} per token ({len(tokens.scores)}), got shape "
            f"{tuple(weights.shape)}, least {float(weights.min()):.3g}, largest {float(weights.max()):.3g}.{_remedy(selector)}"
        )
    return weights


def _remedy(selector: Selector) -> str:
    if not isinstance(selector, Transform) or selector.signed:
        return ""
    return " Where weights below 0 are meant, write signed: true; else end with a step such as relu or clamp: {low: 0}."


def weigh_rows(selector: Selector, rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Rows with the weights that a selector gives to their scores; all of them at once."""
    weights = _weights(selector, scored_tokens(rows))
    parts = iter(weights.split([len(ids) for row in rows for ids in row.encoded.responses]))
    return [replace(row, weights=[next(parts) for _ in row.encoded.responses]) for row in rows]


def weigh_batch(selector: Selector, rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Weights of the comparisons of one optimizer step, among which the selector chooses.

    A comparison in a step cannot be dropped any more, so a response of which nothing was kept keeps the one
    token that speaks most for its side.
    """
    weighted = weigh_rows(selector, rows)
    return [
        replace(row, weights=[_at_least_one(row, side) for side in range(len(row.scores or ()))])
        for row in weighted
    ]


def _at_least_one(row: TokenRow, side: int) -> Tensor:
    assert row.weights is not None
    assert row.scores is not None
    weights, scores = row.weights[side], row.scores[side].nan_to_num(0.0)
    if bool((weights != 0).any()):
        return weights
    best = scores.argmax() if row.encoded.comparison.ranks[side] == 0 else scores.argmin()
    return torch.zeros_like(weights).index_fill(0, best, 1.0)


def scored_tokens(rows: Sequence[TokenRow]) -> ScoredTokens:
    """Scores of rows laid end to end, as a selector takes them."""
    rows = list(rows)
    scores = torch.cat([score for row in rows for score in row.scores or ()])
    return tokens_of(responses_of([row.encoded for row in rows]), scores)


def tokens_of(known: Responses, scores: Tensor) -> ScoredTokens:
    """Scores of responses laid end to end, as a selector takes them."""
    lengths = torch.from_numpy(known.lengths)
    response = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    ends = torch.cumsum(lengths, 0)[response]
    eos = torch.from_numpy(np.asarray(known.eos, np.int64))[response]
    sizes = torch.from_numpy(np.diff(known.starts))
    return ScoredTokens(
        scores=scores,
        response=response,
        comparison=torch.repeat_interleave(torch.arange(len(sizes)), sizes),
        rank=torch.from_numpy(np.asarray(known.ranks, np.int64)),
        eos=torch.arange(len(response)) >= ends - eos,
        seeds=torch.from_numpy((known.keys >> np.uint64(1)).astype(np.int64)),
    )
