"""The one place where scores become weights: for a table, for the rows of a step and for a batch."""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tokenward.errors import UserError, no_exit
from tokenward.ops.alignment import sums_of_segments
from tokenward.plugins import name_of
from tokenward.scoring.reads import numbers_of
from tokenward.selection.base import ScoredTokens, Selector, is_signed, scope_of, unit_of
from tokenward.selection.selectors import Transform
from tokenward.tokens.rows import TokenRow, keys_of
from tokenward.tokens.segments import Unit, with_segments
from tokenward.tokens.table import CHUNK_ROWS, JOINT, TokenTable


def weights_of(selector: Selector, tokens: ScoredTokens) -> Tensor:
    """The weights that a selector gives scored tokens.  -> [n] float32

    Tokens that are ``joint`` are selected as one: the selector sees each segment as a token, whose score is the sum of its
    tokens' scores, and each of its tokens gets its weight. So fractions and positions count segments.

    Raises:
        UserError: They are not one finite number per token, or negative although the selector is not ``signed``; or the selector
            calls ``sys.exit()``.
    """
    if tokens.joint is not None and len(tokens.joint):
        segment = _numbered(tokens.joint, tokens.response)
        return weights_of(selector, _as_one(tokens, segment))[segment]
    own = tokens._replace(scores=tokens.scores.clone())  # a selector may change them in place
    with no_exit("selector", name_of(selector)):
        returned = selector(own)
    weights = numbers_of("selector", selector, returned).to(tokens.scores.device)
    signed = is_signed(selector)
    fits = weights.shape == tokens.scores.shape and bool(weights.isfinite().all())
    if fits and (signed or not bool((weights < 0).any())):
        return weights
    bounds = f", from {float(weights.min()):.3g} to {float(weights.max()):.3g}" if weights.numel() else ""
    remedy = ""
    if isinstance(selector, Transform) and not signed:
        remedy = (
            " Set signed: true to allow negative weights, or end with a step such as relu or clamp: {low: 0}."
        )
    raise UserError(
        f"the selector {name_of(selector)} must give one finite weight{'' if signed else ' >= 0'} per token "
        f"({len(tokens.scores)}), got shape {tuple(weights.shape)}{bounds}.{remedy}",
        code="wrong-result",
    )


def _numbered(joint: Tensor, response: Tensor) -> Tensor:
    """Segments of all responses, numbered from 0 in their order.  [n], [n] -> [n]"""
    fresh = torch.ones(len(joint), dtype=torch.bool, device=joint.device)
    fresh[1:] = (joint[1:] != joint[:-1]) | (response[1:] != response[:-1])
    return fresh.long().cumsum(0) - 1


def _as_one(tokens: ScoredTokens, segment: Tensor) -> ScoredTokens:
    """Each segment as a token, at the place of its first one."""
    first = torch.searchsorted(segment, torch.arange(int(segment[-1]) + 1, device=segment.device))
    unit = tokens.segment
    return tokens._replace(
        scores=sums_of_segments(tokens.scores, segment).to(tokens.scores.dtype),
        response=tokens.response[first],
        eos=tokens.eos[first],
        segment=None if unit is None else unit[first],
        joint=None,
    )


def weigh(
    table: TokenTable, selector: Selector, tokenizer: PreTrainedTokenizerBase | None = None
) -> TokenTable:
    """Add the column ``weights``, which a selector computes from the column ``scores``.

    Args:
        table: Rows with scores.
        selector: Called with some rows at a time, or with all of them if its scope is ``dataset`` or ``batch``.
        tokenizer: Tokenizer of the rows, for a selector that pools over words, sentences or spans.
    """
    step = max(len(table), 1) if scope_of(selector) in ("dataset", "batch") else CHUNK_ROWS
    parts = (
        weights_of(selector, _table_tokens(table, first, min(first + step, len(table)), selector, tokenizer))
        for first in range(0, len(table), step)
    )
    return table.with_column("weights", table.own_column(parts))


def _joint_of(table: TokenTable, responses: slice) -> Tensor | None:
    """The segments of some responses' tokens, if their scores came from another tokenizer.  -> [n]"""
    column = table.columns.get(JOINT)
    return None if column is None else column.gathered(table.lengths[responses], responses.start).long()


def _table_tokens(
    table: TokenTable,
    first: int,
    last: int,
    selector: Selector,
    tokenizer: PreTrainedTokenizerBase | None,
) -> ScoredTokens:
    """The tokens of the rows ``first`` to ``last`` of a table."""
    responses = slice(int(table.starts[first]), int(table.starts[last]))
    lengths = table.lengths[responses]
    tokens = tokens_of(
        table.columns["scores"].gathered(lengths, responses.start),
        lengths=torch.from_numpy(lengths),
        sizes=torch.from_numpy(table.sizes[first:last]),
        ranks=torch.from_numpy(np.asarray(table.ranks[responses], np.int64)),
        eos=torch.from_numpy(np.asarray(table.eos[responses], np.int64)),
        keys=table.keys[responses],
        joint=_joint_of(table, responses),
    )
    if not unit_of(selector):
        return tokens
    assert tokenizer is not None
    rows = [table[number] for number in range(first, last)]
    return tokens._replace(segment=_segments(rows, unit_of(selector), tokenizer))


def weigh_rows(selector: Selector, rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Rows with the weights that a selector computes from the scores of all of them."""
    responses = [ids for row in rows for ids in row.responses]
    joint = [part for row in rows for part in row.values.get(JOINT, ())]
    tokens = tokens_of(
        torch.cat([score for row in rows for score in row.scores or ()]),
        lengths=torch.tensor([len(ids) for ids in responses]),
        sizes=torch.tensor([len(row.responses) for row in rows]),
        ranks=torch.tensor([rank for row in rows for rank in row.comparison.ranks]),
        eos=torch.tensor([count for row in rows for count in row.eos]),
        keys=np.array([int(key, 16) for row in rows for key in keys_of(row.comparison)], np.uint64),
        joint=torch.cat(joint).long() if joint else None,
    )
    parts = iter(weights_of(selector, tokens).split([len(ids) for ids in responses]))
    return [replace(row, weights=[next(parts) for _ in row.responses]) for row in rows]


def weigh_step(selector: Selector, rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Rows of one optimizer step, weighed together.

    A comparison can no longer be dropped in the step, so a response that would keep no token keeps those that the selector
    gives its comparison alone.
    """
    return [_with_some(selector, row) for row in weigh_rows(selector, rows)]


def selects_alone(selector: Selector, row: TokenRow) -> bool:
    """Whether a selector leaves every response of a comparison some token if it sees no other comparison."""
    (alone,) = weigh_rows(selector, [row])
    return all(bool((weights != 0).any()) for weights in alone.weights or ())


def _with_some(selector: Selector, row: TokenRow) -> TokenRow:
    weights = row.weights or []
    if all(bool((own != 0).any()) for own in weights):
        return row
    (alone,) = weigh_rows(selector, [row])
    pairs = zip(weights, alone.weights or [], strict=True)
    return replace(row, weights=[own if bool((own != 0).any()) else other for own, other in pairs])


def tokens_of(
    scores: Tensor,
    *,
    lengths: Tensor,
    sizes: Tensor,
    ranks: Tensor,
    eos: Tensor,
    keys: np.ndarray,
    joint: Tensor | None = None,
) -> ScoredTokens:
    """What a selector receives, from the scores of all responses end to end and facts of each response.

    Args:
        scores: ``[n]``.
        lengths: ``[r]``, number of tokens.
        sizes: ``[b]``, number of responses of each comparison.
        ranks: ``[r]``.
        eos: ``[r]``, number of end-of-turn tokens at the end.
        keys: ``[r]`` uint64, stable names.
        joint: ``[n]`` or None; see :class:`ScoredTokens`.
    """
    response = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return ScoredTokens(
        scores=scores,
        response=response,
        comparison=torch.repeat_interleave(torch.arange(len(sizes)), sizes),
        rank=ranks,
        eos=torch.arange(len(response)) >= (torch.cumsum(lengths, 0) - eos)[response],
        seeds=torch.from_numpy((keys >> np.uint64(1)).astype(np.int64)),
        joint=joint,
    )


def _segments(rows: Sequence[TokenRow], unit: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Index of each response token's word, sentence or span, over all rows.  -> [n]"""
    parts, before = [], 0
    for row in rows:
        for part in with_segments(cast(Unit, unit), tokenizer, row).segments or ():
            numbers = torch.unique_consecutive(part, return_inverse=True)[1]
            parts.append(numbers + before)
            before += int(numbers[-1]) + 1
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)
