"""The text that a response's tokens spell, and the segments of it that share a reward."""

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tokenward.errors import UserError
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.spans import ByteSpan, spans_of_ids, spans_of_whole, token_spans
from tokenward.types import Span


class Spelled(NamedTuple):
    """A response as text.

    Attributes:
        text: The data's own where the response is one message whose tokens are those of its text alone; otherwise all
            that stands between the prompt and the end of turn, what the template writes and the messages of others
            included.
        spans: Bytes in it of each token that the assistant writes; empty for those that close the response.
        own: Whether the text is the data's.
    """

    text: str
    spans: list[ByteSpan]
    own: bool


def spelled(tokenizer: PreTrainedTokenizerBase, row: TokenRow, place: int) -> Spelled:
    """The text of a response, given its place in its comparison."""
    comparison, ids = row.comparison, row.responses[place]
    count = len(ids) - row.eos[place]
    alone = comparison.turns is None or comparison.turns[place] is None
    if alone and not row.inserts(place):
        text = comparison.responses[place]
        encoding = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        own = list(encoding["input_ids"])
        if own[:count] == ids[:count]:
            # White space that a template cuts off is none of the response's tokens.
            count = len(ids) if own[: len(ids)] == ids else count
            end = ByteSpan(len(text.encode()), len(text.encode()))
            return Spelled(text, [*token_spans(tokenizer, text, count), *[end] * (len(ids) - count)], True)
    whole, places = row.whole(place)
    eos = len(ids) - count
    text, spans = spans_of_whole(tokenizer, whole[: len(whole) - eos])
    end = ByteSpan(len(text.encode()), len(text.encode()))
    return Spelled(text, [*(spans[at] for at in places[:count]), *[end] * eos], False)


def place_in(response: str, text: str) -> int | None:
    """Characters by which a response's text is shifted in a text that holds it, or None; white space may be cut off it."""
    core = response.strip()
    place = text.rfind(
        core
    )  # a reply's text is the last; before it may stand a thought that holds the same words
    return None if place < 0 or not core else place - (len(response) - len(response.lstrip()))


def moved(spans: Sequence[Span], response: str, text: str, source: str) -> list[Span]:
    """Character spans of a response's text as spans of a longer text that holds it.

    Raises:
        UserError: it does not hold it.
    """
    shift = place_in(response, text) if spans else 0
    if shift is None:
        raise UserError(
            f"{source}: the spans of a response cannot be placed, since its template does not write its text as it is. Take the spans out."
        )
    return [
        Span(max(span.start + shift, 0), min(span.end + shift, len(text)), span.value)
        for span in spans
        if span.end + shift > 0 and span.start + shift < len(text)
    ]


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
