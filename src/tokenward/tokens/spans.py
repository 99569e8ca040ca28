"""The bytes of a text that each token covers."""

import re
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from tokenward.errors import UserError
from tokenward.types import Span

_SPACE_MARK = "\u2581"
_SUBSTITUTE = "\x1a"
_STRAY = re.compile("[\udc80-\udcff]")  # a byte that surrogateescape could not decode


class ByteSpan(NamedTuple):
    """UTF-8 bytes ``start`` to ``end`` (exclusive) of a text; empty for a token that is not text."""

    start: int
    end: int


def byte_spans(tokenizer: PreTrainedTokenizerBase, text: str) -> list[ByteSpan]:
    """The bytes of ``text`` that each of its tokens covers.

    Exact for byte-level and byte-fallback vocabularies, even if several tokens share a character. If the tokens do not
    spell the text, because a normalizer changed it, the tokenizer's character offsets are used.

    Raises:
        UserError: The tokenizer is slow and has no offsets.
    """
    (encoded,) = encode_texts(tokenizer, [text])
    return spans_of_encoded(encoded, text, byte_pieces(tokenizer, encoded.ids))


class EncodedText(NamedTuple):
    """A text on its own as ids, with the first and last (exclusive) character of each."""

    ids: list[int]
    offsets: list[tuple[int, int]]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[EncodedText]:
    """Each text on its own as ids; special tokens in it are text. Many at once are much faster than one by one.

    Raises:
        UserError: The tokenizer is slow and has no offsets.
    """
    if not texts:
        return []
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} is slow and has no offsets, so its tokens cannot be located in the "
            "text. Save it as a fast tokenizer (tokenizer.json).",
            code="slow-tokenizer",
        )
    found = tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    return [*map(EncodedText, found["input_ids"], found["offset_mapping"])]  # type: ignore[arg-type]  # lists


def spans_of_encoded(encoded: EncodedText, text: str, pieces: Sequence[bytes]) -> list[ByteSpan]:
    """:func:`byte_spans` of a text whose tokens are known, with the bytes that each of them spells."""
    spelled = b"".join(pieces)
    if spelled == text.encode():
        return _concatenate(pieces, 0)
    # SentencePiece decodes its space mark as a space, even one in the text, and adds a space before the first word.
    shown = text.replace(_SPACE_MARK, " ").encode()
    if spelled in (shown, b" " + shown):
        place = _places_of_shown(text)
        spans = _concatenate(pieces, len(shown) - len(spelled))
        return [ByteSpan(place[max(span.start, 0)], place[span.end]) for span in spans]
    position = _byte_positions(text)
    return [ByteSpan(position[start], position[end]) for start, end in encoded.offsets]


def spans_of_ids(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, special: bool = False
) -> tuple[str, list[ByteSpan]]:
    """The text that ids spell, and the bytes of each id in it.

    Sampled ids can differ from those that encoding the text gives. A byte that is not part of a complete character is
    shown as U+001A, which is also one byte. Special tokens spell nothing unless ``special`` is set.
    """
    hidden = set() if special else set(tokenizer.all_special_ids)
    found = zip(ids, byte_pieces(tokenizer, ids), strict=True)
    return spelled_by([b"" if token in hidden else piece for token, piece in found])


def spelled_by(pieces: Sequence[bytes]) -> tuple[str, list[ByteSpan]]:
    """:func:`spans_of_ids` of tokens that spell these bytes."""
    text = b"".join(pieces).decode(errors="surrogateescape")
    return _STRAY.sub(_SUBSTITUTE, text), _concatenate(pieces, 0)


def _concatenate(pieces: Sequence[bytes], start: int) -> list[ByteSpan]:
    ends = list(accumulate(map(len, pieces), initial=start))
    return [ByteSpan(*span) for span in pairwise(ends)]


def byte_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[bytes]:
    """The bytes that each id spells; the space mark of SentencePiece is a space. A special token spells its name."""
    # A model can have more rows than its tokenizer has tokens; those have no text.
    tokens = [token or "" for token in tokenizer.convert_ids_to_tokens(list(ids))]
    if "ByteLevel" not in str(tokenizer.backend_tokenizer.decoder):  # type: ignore[attr-defined]
        return [_sentencepiece_bytes(token) for token in tokens]
    to_byte = _byte_alphabet()
    return [
        bytes(to_byte[char] for char in token) if all(char in to_byte for char in token) else token.encode()
        for token in tokens
    ]


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(_SPACE_MARK, " ").encode()


@cache
def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's printable character for each byte: printable bytes unchanged, the others from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def _places_of_shown(text: str) -> list[int]:
    """The byte of the text for each byte of it with spaces instead of marks, and the length at the end."""
    places, start = [], 0
    for char in text:
        width = len(char.encode())
        places += range(start, start + (1 if char == _SPACE_MARK else width))
        start += width
    return [*places, start]


def _byte_positions(text: str) -> list[int]:
    """The byte at which each character begins, and the length in bytes at the end."""
    return list(accumulate((len(char.encode()) for char in text), initial=0))


def span_values(spans: Sequence[Span], text: str, tokens: Sequence[ByteSpan]) -> list[float]:
    """The value of each token: that of the character span it overlaps most, otherwise 0."""
    position = _byte_positions(text)
    marks = [(position[span.start], position[span.end], span.value) for span in spans]
    values = []
    for token in tokens:
        overlaps = [(min(token.end, end) - max(token.start, start), value) for start, end, value in marks]
        width, value = max(overlaps, default=(0, 0.0), key=lambda pair: pair[0])
        values.append(value if width > 0 else 0.0)
    return values
