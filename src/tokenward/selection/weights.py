"""From scores to weights: the one place, for a table, for the rows of a step and for a batch."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tokenward.errors import UserError
from tokenward.plugins import name_of
from tokenward.scoring.reads import numbers_of
from tokenward.selection.base import ScoredTokens, Selector, is_signed, scope_of, unit_of
from tokenward.selection.transform import Transform
from tokenward.tokens.rows import TokenRow, keys_of
from tokenward.tokens.segments import Unit, with_segments
from tokenward.tokens.table import CHUNK_ROWS, TokenTable


def weights_of(selector: Selector, tokens: ScoredTokens) -> Tensor:
    """What a selector gives scored tokens.  -> [n] float32

    Raises:
        UserError: it is not one finite number per token, or it is below 0 and the selector is not ``signed``.
    """
    weights = numbers_of("selector", selector, selector(tokens)).to(tokens.scores.device)
    least = "" if is_signed(selector) else " >= 0"
    if (
        weights.shape != tokens.scores.shape
        or not bool(weights.isfinite().all())
        or bool(least and (weights < 0).any())
    ):
        bounds = (
            f", least {float(weights.min()):.3g}, largest {float(weights.max()):.3g}"
            if weights.numel()
            else ""
        )
        raise UserError(
            f"the selector {name_of(selector)} must give one finite weight{least} per token ({len(tokens.scores)}), got shape "
            f"{tuple(weights.shape)}{bounds}.{_remedy(selector)}"
        )
    return weights


def _remedy(selector: Selector) -> str:
    if not isinstance(selector, Transform) or selector.signed:
        return ""
    return " If weights below 0 are meant, write signed: true. Otherwise end with a step such as relu or clamp: {low: 0}."


def weigh(
    table: TokenTable, selector: Selector, tokenizer: PreTrainedTokenizerBase | None = None
) -> TokenTable:
    """A table with the weights that a selector gives to its scores.

    Args:
        table: With a column ``scores``.
        selector: Gives the weights. Unless its scope is larger than a comparison, some rows are looked at at a time.
        tokenizer: Of the rows' ids, for a selector that pools over words, sentences or spans.
    """
    step = max(len(table), 1) if scope_of(selector) in ("dataset", "batch") else CHUNK_ROWS
    parts = (
        weights_of(selector, scored_tokens(table, first, min(first + step, len(table)), selector, tokenizer))
        for first in range(0, len(table), step)
    )
    return table.with_column("weights", table.own_column(parts))


def scored_tokens(
    table: TokenTable,
    first: int = 0,
    last: int | None = None,
    selector: Selector | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> ScoredTokens:
    """The scores of rows ``first`` to ``last`` of a table, as the selector takes them."""
    last = len(table) if last is None else last
    mine = slice(int(table.starts[first]), int(table.starts[last]))
    lengths = table.lengths[mine]
    tokens = tokens_of(
        table.columns["scores"].gathered(lengths, mine.start),
        lengths=torch.from_numpy(lengths),
        sizes=torch.from_numpy(table.sizes[first:last]),
        ranks=torch.from_numpy(np.asarray(table.ranks[mine], np.int64)),
        eos=torch.from_numpy(np.asarray(table.eos[mine], np.int64)),
        keys=table.keys[mine],
    )
    if selector is None or not unit_of(selector):
        return tokens
    assert tokenizer is not None
    rows = [table[number] for number in range(first, last)]
    return tokens._replace(segment=_segments(rows, unit_of(selector), tokenizer))


def weigh_rows(selector: Selector, rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Rows with the weights that a selector gives to their scores, all of them at once."""
    responses = [ids for row in rows for ids in row.responses]
    tokens = tokens_of(
        torch.cat([score for row in rows for score in row.scores or ()]),
        lengths=torch.tensor([len(ids) for ids in responses]),
        sizes=torch.tensor([len(row.responses) for row in rows]),
        ranks=torch.tensor([rank for row in rows for rank in row.comparison.ranks]),
        eos=torch.tensor([count for row in rows for count in row.eos]),
        keys=np.array([int(key, 16) for row in rows for key in keys_of(row.comparison)], np.uint64),
    )
    parts = iter(weights_of(selector, tokens).split([len(ids) for ids in responses]))
    return [replace(row, weights=[next(parts) for _ in row.responses]) for row in rows]


def weigh_step(selector: Selector, rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Weights of the comparisons of one optimizer step, among which the selector chooses.

    A comparison in a step cannot be dropped any more. So a response of which nothing was kept keeps the one token that
    speaks most for its side.
    """
    return [
        replace(row, weights=[_at_least_one(row, side) for side in range(len(row.scores or ()))])
        for row in weigh_rows(selector, rows)
    ]


def _at_least_one(row: TokenRow, side: int) -> Tensor:
    assert row.weights is not None
    assert row.scores is not None
    weights, scores = row.weights[side], row.scores[side]
    if bool((weights != 0).any()):
        return weights
    for_side = scores if row.comparison.ranks[side] == 0 else -scores
    best = for_side.nan_to_num(-math.inf).argmax()
    return torch.zeros_like(weights).index_fill(0, best, 1.0)


def tokens_of(
    scores: Tensor, *, lengths: Tensor, sizes: Tensor, ranks: Tensor, eos: Tensor, keys: np.ndarray
) -> ScoredTokens:
    """Scores as a selector takes them.

    Args:
        scores: ``[n]``, of all responses end to end.
        lengths: ``[r]``, tokens of each response.
        sizes: ``[c]``, responses of each comparison.
        ranks: ``[r]``, 0 is the preferred side.
        eos: ``[r]``, end-of-turn tokens at the end of each response.
        keys: ``[r]`` uint64, stable names of the responses.
    """
    response = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return ScoredTokens(
        scores=scores,
        response=response,
        comparison=torch.repeat_interleave(torch.arange(len(sizes)), sizes),
        rank=ranks,
        eos=torch.arange(len(response)) >= (torch.cumsum(lengths, 0) - eos)[response],
        seeds=torch.from_numpy((keys >> np.uint64(1)).astype(np.int64)),
    )


def _segments(rows: Sequence[TokenRow], unit: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Which word, sentence or span each response token is in, numbered in order over all rows.  -> [n]"""
    parts, before = [], 0
    for row in rows:
        for part in with_segments(cast(Unit, unit), tokenizer, row).segments or ():
            numbers = torch.unique_consecutive(part, return_inverse=True)[1]
            parts.append(numbers + before)
            before += int(numbers[-1]) + 1
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)
