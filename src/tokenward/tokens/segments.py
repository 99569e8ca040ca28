"""Pieces of a response that share one reward: words, sentences, or spans that the data names."""

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tokenward.errors import UserError
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.spans import ByteSpan, spans_of_ids
from tokenward.tokens.spelled import moved, spelled
from tokenward.types import Span

Unit = Literal["token", "word", "sentence", "spans"]

_WORD = re.compile(r"\s*\S+")
# A sentence ends at a mark with white space after it (marks of scripts without spaces need none), or at a line's end;
# white space before its first character is its own.
_CLOSERS = "[\"')\\]\u201d\u2019\u300d\u300f\uff09]*"
_SENTENCE = re.compile(
    rf"\s*(?=\S).*?(?:[.!?\u2026\u061f\u06d4]+{_CLOSERS}(?=\s|$)|[\u3002\uff01\uff1f\u0964]+{_CLOSERS}|\n+|$)",
    re.DOTALL,
)


def token_segments(unit: Unit, text: str, tokens: Sequence[ByteSpan], spans: Sequence[Span] = ()) -> Tensor:
    """Which segment of its response each token belongs to.  -> [len], rising whole numbers

    A token belongs to the segment in which its first byte lies that is no white space: most tokenizers put the space
    before a word into the word's token. What closes a response belongs to its last segment.

    Args:
        unit: ``token`` gives each its own; ``spans`` makes one of each span and one of each gap between two.
        text: The response.
        tokens: Bytes of each of its tokens.
        spans: The data's, by characters; they must not overlap.
    """
    if unit == "token":
        return torch.arange(len(tokens))
    starts = torch.tensor(_starts(unit, text, spans))
    raw = text.encode()
    first = torch.tensor([min(_first_byte(raw, token), max(len(raw) - 1, 0)) for token in tokens])
    return torch.searchsorted(starts, first, right=True) - 1


def _first_byte(raw: bytes, token: ByteSpan) -> int:
    piece = raw[token.start : token.end]
    return token.start + (len(piece) - len(piece.lstrip()) if piece.strip() else 0)


def _starts(unit: Unit, text: str, spans: Sequence[Span]) -> list[int]:
    """Bytes at which segments begin; the first is 0."""
    if unit == "spans":
        ordered = sorted(spans)
        if any(one.end > other.start for one, other in pairwise(ordered)):
            raise UserError(
                f"unit: spans needs spans that do not overlap, got {[(s.start, s.end) for s in ordered]}. Mend the "
                "column spans, or write unit: word or sentence."
            )
        places = {place for span in ordered for place in (span.start, span.end) if place < len(text)}
    else:
        pattern = _WORD if unit == "word" else _SENTENCE
        places = {match.start() for match in pattern.finditer(text)}
    return [len(text[:place].encode()) for place in sorted({0, *places})]


def with_segments(unit: Unit, tokenizer: PreTrainedTokenizerBase, row: TokenRow) -> TokenRow:
    """A row with its tokens' segments, where the reward's unit is larger than a token."""
    if unit == "token":
        return row
    count = len(row.responses)
    return replace(row, segments=[_segments(unit, tokenizer, row, number) for number in range(count)])


def _segments(unit: Unit, tokenizer: PreTrainedTokenizerBase, row: TokenRow, number: int) -> Tensor:
    ids = row.responses[number]
    if unit != "spans":
        text, places = spans_of_ids(tokenizer, ids)
        return token_segments(unit, text, places)
    # Spans count the characters of the data's text; what the ids spell may be another form of it.
    comparison = row.comparison
    given = comparison.spans[number] if comparison.spans is not None else ()
    text, tokens, own = spelled(tokenizer, row, number)
    known = given if own else moved(given, comparison.responses[number], text, comparison.source)
    return token_segments(unit, text, tokens, known)
