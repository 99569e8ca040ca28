"""The text that the tokens of a response spell, and segments of it that share a reward."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tokenward.errors import UserError
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.spans import (
    ByteSpan,
    EncodedText,
    byte_pieces,
    encode_texts,
    spans_of_encoded,
    spans_of_ids,
    spelled_by,
)
from tokenward.types import Span


class Spelled(NamedTuple):
    """A response as text."""

    # The text of the data, if the response is a single message and its tokens are those of the text alone. Otherwise
    # everything between the prompt and the end of turn, with the template's text and others' messages.
    text: str
    spans: list[ByteSpan]  # bytes of each token of the assistant in the text; empty for eos tokens
    own: bool  # whether the text is that of the data


def spelled(tokenizer: PreTrainedTokenizerBase, row: TokenRow, place: int) -> Spelled:
    """The text of a response, given its position in the comparison."""
    return spelled_all(tokenizer, [(row, place)])[0]


def spelled_all(
    tokenizer: PreTrainedTokenizerBase, responses: Sequence[tuple[TokenRow, int]]
) -> list[Spelled]:
    """:func:`spelled` of many responses at once, which is much faster than one by one."""
    texts = [_own_text(row, place) for row, place in responses]
    encoded = iter(encode_texts(tokenizer, [text for text in texts if text is not None]))
    known = [None if text is None else next(encoded) for text in texts]
    wholes = [row.whole(place) for row, place in responses]
    tokens = {token for ids, _ in wholes for token in ids} | {
        token for own in known if own for token in own.ids
    }
    listed = list(tokens)
    piece = dict(zip(listed, byte_pieces(tokenizer, listed), strict=True))
    found = []
    for (row, place), text, own, (ids, places) in zip(responses, texts, known, wholes, strict=True):
        matched = None if text is None or own is None else _as_data(row, place, text, own, piece)
        found.append(matched or _as_read(row, place, ids, places, piece))
    return found


def _own_text(row: TokenRow, place: int) -> str | None:
    """The text of the data if the response is a single message without tokens of others; else None."""
    turns = row.comparison.turns
    alone = turns is None or turns[place] is None
    return row.comparison.responses[place] if alone and not row.inserts(place) else None


def _as_data(
    row: TokenRow, place: int, text: str, own: EncodedText, piece: Mapping[int, bytes]
) -> Spelled | None:
    """A response whose tokens are those of its text alone; None if they are not."""
    ids = row.responses[place]
    count = len(ids) - row.eos[place]
    if own.ids[:count] != ids[:count]:
        return None
    # White space that a template strips is in the text, but has no tokens in the response.
    count = len(ids) if own.ids[: len(ids)] == ids else count
    spans = spans_of_encoded(own, text, [piece[token] for token in own.ids])[:count]
    return Spelled(text, _with_eos(spans, text, len(ids)), True)


def _as_read(
    row: TokenRow, place: int, ids: Sequence[int], places: Sequence[int], piece: Mapping[int, bytes]
) -> Spelled:
    """A response as all the text that its tokens and those between them spell."""
    length, eos = len(row.responses[place]), row.eos[place]
    text, spans = spelled_by([piece[token] for token in ids[: len(ids) - eos]])
    return Spelled(text, _with_eos([spans[at] for at in places[: length - eos]], text, length), False)


def _with_eos(spans: list[ByteSpan], text: str, length: int) -> list[ByteSpan]:
    end = len(text.encode())
    return [*spans, *[ByteSpan(end, end)] * (length - len(spans))]


def place_in(response: str, text: str) -> int | None:
    """The offset, in characters, of a response in a text that contains it; None if it does not.

    White space around the response may be missing in the text.
    """
    core = response.strip()
    # The reply is the last occurrence: reasoning before it can contain the same words.
    place = text.rfind(core)
    return None if place < 0 or not core else place - (len(response) - len(response.lstrip()))


def moved(spans: Sequence[Span], response: str, text: str, source: str) -> list[Span]:
    """Character spans of a response as spans of a longer text that contains it.

    Raises:
        UserError: The text does not contain the response.
    """
    shift = place_in(response, text) if spans else 0
    if shift is None:
        raise UserError(
            f"{source}: the spans of a response cannot be located, because the chat template changes its text. Remove the "
            "spans.",
            code="unplaced-spans",
        )
    return [
        Span(max(span.start + shift, 0), min(span.end + shift, len(text)), span.value)
        for span in spans
        if span.end + shift > 0 and span.start + shift < len(text)
    ]


Unit = Literal["token", "word", "sentence", "spans"]

_WORD = re.compile(r"\s*\S+")
# A sentence ends at a mark followed by white space (not required after the marks of scripts without spaces) or at the
# end of a line. White space before its first character belongs to it.
_CLOSERS = "[\"')\\]\u201d\u2019\u300d\u300f\uff09]*"
_SENTENCE = re.compile(
    rf"\s*(?=\S).*?(?:[.!?\u2026\u061f\u06d4]+{_CLOSERS}(?=\s|$)|[\u3002\uff01\uff1f\u0964]+{_CLOSERS}|\n+|$)",
    re.DOTALL,
)


def token_segments(unit: Unit, text: str, tokens: Sequence[ByteSpan], spans: Sequence[Span] = ()) -> Tensor:
    """The segment of the response that each token belongs to.  -> [len], increasing integers

    A token belongs to the segment of its first byte that is not white space, because most tokenizers put the space before
    a word into the word's token. Eos tokens belong to the last segment.

    Args:
        unit: ``token`` gives each token its own segment; ``spans`` makes one of each span and one of each gap.
        text: The response.
        tokens: Bytes of each of its tokens.
        spans: The spans of the data, in characters. They must not overlap.
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
                f"unit spans needs spans that do not overlap, got {[(s.start, s.end) for s in ordered]}. Fix the column "
                "spans, or use the unit word or sentence.",
                code="overlapping-spans",
            )
        places = {place for span in ordered for place in (span.start, span.end) if place < len(text)}
    else:
        pattern = _WORD if unit == "word" else _SENTENCE
        places = {match.start() for match in pattern.finditer(text)}
    return [len(text[:place].encode()) for place in sorted({0, *places})]


def with_segments(unit: Unit, tokenizer: PreTrainedTokenizerBase, row: TokenRow) -> TokenRow:
    """The row with the segments of its tokens; unchanged for the unit ``token``."""
    if unit == "token":
        return row
    places = range(len(row.responses))
    return replace(row, segments=[_segments_of(unit, tokenizer, row, place) for place in places])


def _segments_of(unit: Unit, tokenizer: PreTrainedTokenizerBase, row: TokenRow, place: int) -> Tensor:
    if unit != "spans":
        return token_segments(unit, *spans_of_ids(tokenizer, row.responses[place]))
    # Spans are in characters of the data's text, and the ids may spell another form of it.
    comparison = row.comparison
    given = comparison.spans[place] if comparison.spans is not None else ()
    text, tokens, own = spelled(tokenizer, row, place)
    known = given if own else moved(given, comparison.responses[place], text, comparison.source)
    return token_segments(unit, text, tokens, known)
