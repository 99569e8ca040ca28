"""Which bytes of a text each token covers."""

import re
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from tokenward.errors import UserError
from tokenward.types import Span

SPACE_MARK = "\u2581"
SUBSTITUTE = "\x1a"
_STRAY = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of a byte


class ByteSpan(NamedTuple):
    """UTF-8 bytes ``start`` to ``end`` (exclusive) of a text; empty for a token that is no text."""

    start: int
    end: int


def byte_spans(tokenizer: PreTrainedTokenizerBase, text: str) -> list[ByteSpan]:
    """Bytes of ``text`` that each of its tokens covers, in order.

    Exact for byte-level and byte-fallback vocabularies, also where several tokens share one
    character. Where tokens do not spell the text (a normaliser changed it), the tokenizer's
    character offsets are used.

    Raises:
        UserError: the tokenizer is slow (no offsets).
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} is a slow one and gives no offsets, so its tokens cannot be "
            "placed in the text. Save it once as a fast tokenizer (tokenizer.json)."
        )
    encoding = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    pieces = _byte_pieces(tokenizer, encoding["input_ids"])
    spelled = b"".join(pieces)
    raw = text.encode()
    if spelled == raw:
        return _lay_out(pieces, 0)
    # SentencePiece writes a space as its mark, also where the mark stood in the text, and puts one before the first word.
    shown = text.replace(SPACE_MARK, " ").encode()
    if spelled in (shown, b" " + shown):
        place = _places_of_shown(text)
        spans = _lay_out(pieces, len(shown) - len(spelled))
        return [ByteSpan(place[max(span.start, 0)], place[span.end]) for span in spans]
    return _from_offsets(text, encoding["offset_mapping"])


def token_spans(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> list[ByteSpan]:
    """Spans of the first ``count`` tokens of a response: its text's, then empty ones for what closes it."""
    end = len(text.encode())
    spans = byte_spans(tokenizer, text)
    return [*spans, *[ByteSpan(end, end)] * (count - len(spans))][:count]


def spans_of_whole(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, list[ByteSpan]]:
    """As :func:`spans_of_ids`, but special tokens are spelled too: marks of a template between messages are shown."""
    pieces = _byte_pieces(tokenizer, ids)
    text = b"".join(pieces).decode(errors="surrogateescape")
    return _STRAY.sub(SUBSTITUTE, text), _lay_out(pieces, 0)


def spans_of_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, list[ByteSpan]]:
    """The text that sampled ids spell, and the bytes of each of them in it; special tokens spell nothing.

    Sampled ids need not be those that encoding their text would give. A byte that is no part of a character, such as
    the first half of one that was never finished, stands in the text as U+001A, which is one byte too.
    """
    special = set(tokenizer.all_special_ids)
    pieces = [
        b"" if token in special else piece
        for token, piece in zip(ids, _byte_pieces(tokenizer, ids), strict=True)
    ]
    text = b"".join(pieces).decode(errors="surrogateescape")
    return _STRAY.sub(SUBSTITUTE, text), _lay_out(pieces, 0)


def _lay_out(pieces: Sequence[bytes], start: int) -> list[ByteSpan]:
    spans = []
    for piece in pieces:
        spans.append(ByteSpan(start, start + len(piece)))
        start += len(piece)
    return spans


def _byte_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[bytes]:
    # A model may have more rows than its tokenizer has tokens; what the others write is no text.
    tokens = [token or "" for token in tokenizer.convert_ids_to_tokens(list(ids))]
    if "ByteLevel" in str(tokenizer.backend_tokenizer.decoder):  # type: ignore[attr-defined]
        to_byte = _byte_alphabet()
        return [
            bytes(to_byte[char] for char in token)
            if all(char in to_byte for char in token)
            else token.encode()
            for token in tokens
        ]
    return [_sentencepiece_bytes(token) for token in tokens]


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(SPACE_MARK, " ").encode()


@cache
def _byte_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level BPE: printable bytes as they are, the rest from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def _from_offsets(text: str, offsets: Sequence[tuple[int, int]]) -> list[ByteSpan]:
    position = _byte_positions(text)
    return [ByteSpan(position[start], position[end]) for start, end in offsets]


def _places_of_shown(text: str) -> list[int]:
    """Byte of the text for each byte of it with a space for every mark, and the length at the end."""
    places, start = [], 0
    for char in text:
        width = len(char.encode())
        places += range(start, start + (1 if char == SPACE_MARK else width))
        start += width
    return [*places, start]


def _byte_positions(text: str) -> list[int]:
    """Byte at which each character begins, and the length in bytes at the end."""
    positions, total = [0], 0
    for char in text:
        total += len(char.encode())
        positions.append(total)
    return positions


def span_values(spans: Sequence[Span], text: str, tokens: Sequence[ByteSpan]) -> list[float]:
    """Value of each token under character spans: the value of the span it overlaps most, else 0."""
    position = _byte_positions(text)
    marks = [(position[span.start], position[span.end], span.value) for span in spans]
    values = []
    for token in tokens:
        overlaps = [(min(token.end, end) - max(token.start, start), value) for start, end, value in marks]
        width, value = max(overlaps, default=(0, 0.0), key=lambda pair: pair[0])
        values.append(value if width > 0 else 0.0)
    return values
