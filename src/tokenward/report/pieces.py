"""The text of each token in whole characters, and the words and sentences of a response."""

from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import regex

from tokenward.scoring.store import TokenRecord
from tokenward.tokens.segments import Unit, token_segments
from tokenward.tokens.spans import ByteSpan


def piece_ends(text: str, ends: Sequence[int]) -> np.ndarray:
    """The end of each token in the text; an end inside a character moves to the end of that character.

    If several tokens share a character, the first one shows it and the others show nothing. A character is an extended
    grapheme cluster, such as an emoji sequence or a letter with its accents.

    Args:
        text: The response.
        ends: ``[n]``, the byte after each token's last byte in UTF-8, in ascending order.

    Returns:
        ``[n]``, in UTF-16 code units, as a browser counts.
    """
    characters = regex.findall(r"\X", text)
    in_bytes = [0, *accumulate(len(char.encode(errors="surrogatepass")) for char in characters)]
    in_units = [0, *accumulate(len(_utf16(char)) // 2 for char in characters)]
    places = np.searchsorted(in_bytes, np.asarray(ends))
    return np.asarray(in_units)[np.minimum(places, len(in_units) - 1)]


def _utf16(text: str) -> bytes:
    return text.encode("utf-16-le", errors="surrogatepass")


def _cut(text: str, starts: Sequence[int], ends: Sequence[int]) -> list[str]:
    units = _utf16(text)
    spans = zip(starts, ends, strict=True)
    return [units[2 * start : 2 * end].decode("utf-16-le", errors="replace") for start, end in spans]


def eos_count(text: str, record: TokenRecord) -> int:
    """How many tokens at the end of a response are eos tokens, without text."""
    size = len(text.encode(errors="surrogatepass"))
    count = 0
    for start, end in zip(reversed(record.start), reversed(record.end), strict=True):
        if start != end or start != size:
            break
        count += 1
    return count


def pieces(text: str, record: TokenRecord, names: dict[int, str]) -> list[str]:
    """The text of each token, and the name of each eos token.  -> [n]"""
    ends = piece_ends(text, record.end).tolist()
    first_eos = len(ends) - eos_count(text, record)
    shown = _cut(text, _starts(text, record, ends), ends)[:first_eos]
    return shown + [names.get(token, f"[{token}]") for token in record.ids[first_eos:]]


def context_before(text: str, record: TokenRecord) -> list[str]:
    """Text before each token that the model reads but that is not scored, such as tool results.  -> [n]"""
    ends = piece_ends(text, record.end).tolist()
    return _cut(text, [0, *ends[:-1]], _starts(text, record, ends))


def _starts(text: str, record: TokenRecord, ends: Sequence[int]) -> list[int]:
    """The start of each token: the end of the token before it, unless there is context between them.  -> [n]"""
    before = [0, *ends[:-1]]
    if record.text is None:
        return before
    own = piece_ends(text, record.start).tolist()
    return [max(start, end) for start, end in zip(own, before, strict=True)]


def token_class(piece: str, *, eos: bool) -> str:
    """A coarse class of a token, by its text."""
    if eos:
        return "eos"
    bare = piece.strip()
    if not piece:
        return "part of a character"
    if not bare:
        return "white space"
    if any(char.isdigit() for char in bare):
        return "number"
    if not any(char.isalnum() for char in bare):
        return "punctuation"
    return "word start" if piece[0].isspace() or bare[0].isupper() else "inside a word"


WORD, SENTENCE = 1, 2
"""Bits that say whether a token starts a word or a sentence."""

_BITS: tuple[tuple[Unit, int], ...] = (("word", WORD), ("sentence", SENTENCE))


class SharedWords(NamedTuple):
    """A run of words that both responses have: the number of its first word in each, and its size."""

    first: int
    second: int
    size: int


def breaks(text: str, record: TokenRecord) -> np.ndarray:
    """:data:`WORD` and :data:`SENTENCE` bits of each token.  -> [n] uint8

    The units are those of a reward with ``unit: word`` or ``unit: sentence``.
    """
    tokens = [ByteSpan(*span) for span in zip(record.start, record.end, strict=True)]
    found = np.zeros(len(tokens), np.uint8)
    for unit, bit in _BITS if tokens else ():
        segments = token_segments(unit, text, tokens).numpy()
        found += bit * np.diff(segments, prepend=segments[0] - 1).astype(bool).astype(np.uint8)
    return found


def words(pieces: Sequence[str], begins: np.ndarray) -> list[str]:
    """The words of a response without the white space around them, from its pieces, eos left out, and their breaks."""
    found: list[str] = []
    for piece, bits in zip(pieces, begins, strict=True):
        if bits & WORD:
            found.append("")
        found[-1] += piece
    return [word.strip() for word in found]


def shared_words(first: Sequence[str], second: Sequence[str]) -> list[SharedWords]:
    """Runs of equal words in the same order, as :mod:`difflib` finds them."""
    blocks = SequenceMatcher(None, first, second).get_matching_blocks()
    return [SharedWords(*block) for block in blocks if block.size]
