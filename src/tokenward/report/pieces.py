"""The text that each token shows, in whole characters, and the labels of the report."""

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

import numpy as np
import regex

from tokenward.scoring.store import TokenRecord
from tokenward.tokens.segments import Unit, token_segments
from tokenward.tokens.spans import ByteSpan

_CHARACTER = regex.compile(r"\X")
"""An extended grapheme cluster: an emoji sequence or a letter with its accents is one."""


def piece_ends(text: str, ends: Sequence[int]) -> np.ndarray:
    """Where each token's piece of the text ends; an end inside a character moves to the character's end.

    So the first of several tokens that share a character shows it, and the others show nothing.

    Args:
        text: The response.
        ends: ``[n]``, byte after each token's last one in the text's UTF-8, never falling.

    Returns:
        ``[n]``, in UTF-16 code units, which is how a browser counts.
    """
    at_bytes, at_units = [0], [0]
    for match in _CHARACTER.finditer(text):
        cluster = match.group()
        at_bytes.append(at_bytes[-1] + len(cluster.encode(errors="surrogatepass")))
        at_units.append(at_units[-1] + sum(1 + (ord(char) > 0xFFFF) for char in cluster))
    places = np.searchsorted(at_bytes, np.asarray(ends))
    return np.asarray(at_units)[np.minimum(places, len(at_units) - 1)]


def eos_count(text: str, record: TokenRecord) -> int:
    """How many tokens at the end of a response are no text but close its turn."""
    size = len(text.encode(errors="surrogatepass"))
    count = 0
    for start, end in zip(reversed(record.start), reversed(record.end), strict=True):
        if start != end or start != size:
            break
        count += 1
    return count


def pieces(text: str, record: TokenRecord, names: dict[int, str]) -> list[str]:
    """The text of each token, and of a closing token its name.  -> [n]"""
    eos = eos_count(text, record)
    units = text.encode("utf-16-le", errors="surrogatepass")
    ends = piece_ends(text, record.end).tolist()
    starts = _starts(text, record, ends)
    shown = [
        units[2 * start : 2 * end].decode("utf-16-le", errors="replace")
        for start, end in zip(starts, ends, strict=True)
    ]
    first = len(shown) - eos
    return shown[:first] + [names.get(token, f"[{token}]") for token in record.ids[first:]]


def _starts(text: str, record: TokenRecord, ends: Sequence[int]) -> list[int]:
    """Where each token's piece begins: where the one before it ends, unless context stands between.  -> [n]"""
    before = [0, *ends[:-1]]
    if record.text is None:
        return before
    own = piece_ends(text, record.start).tolist()
    return [max(start, end) for start, end in zip(own, before, strict=True)]


def context_before(text: str, record: TokenRecord) -> list[str]:
    """Text before each token that the model reads and that has no score; mostly none.  -> [n]"""
    ends = piece_ends(text, record.end).tolist()
    units = text.encode("utf-16-le", errors="surrogatepass")
    places = zip([0, *ends[:-1]], _starts(text, record, ends), strict=True)
    return [units[2 * end : 2 * start].decode("utf-16-le", errors="replace") for end, start in places]


def token_class(piece: str, *, eos: bool) -> str:
    """A coarse kind of token by what it shows."""
    if eos:
        return "end of turn"
    bare = piece.strip()
    if not piece:
        return "rest of a character"
    if not bare:
        return "white space"
    if any(char.isdigit() for char in bare):
        return "number"
    if not any(char.isalnum() for char in bare):
        return "punctuation"
    return "word begins" if piece[0].isspace() or bare[0].isupper() else "word goes on"


WORD, SENTENCE = 1, 2
"""Bits of a token's breaks: it begins a word, a sentence."""

_BITS: tuple[tuple[Unit, int], ...] = (("word", WORD), ("sentence", SENTENCE))


class SharedWords(NamedTuple):
    """A run of words that stands in both responses.

    Attributes:
        first: Number of its first word in the one response.
        second: And in the other.
        size: How many words it has.
    """

    first: int
    second: int
    size: int


def breaks(text: str, record: TokenRecord) -> np.ndarray:
    """Where units begin: :data:`WORD` and :data:`SENTENCE` for each token, added.  -> [n] uint8

    The units are those of a reward with ``unit: word`` or ``unit: sentence``.
    """
    tokens = [ByteSpan(*span) for span in zip(record.start, record.end, strict=True)]
    found = np.zeros(len(tokens), np.uint8)
    if not tokens:
        return found
    for unit, bit in _BITS:
        segments = token_segments(unit, text, tokens).numpy()
        found += bit * np.diff(segments, prepend=segments[0] - 1).astype(bool).astype(np.uint8)
    return found


def words(pieces: Sequence[str], begins: np.ndarray) -> list[str]:
    """The words of a response, without the white space around them.

    Args:
        pieces: ``[n]``, the text of each of its tokens, those that close it left out.
        begins: ``[n]``, what :func:`breaks` says of them.
    """
    found: list[str] = []
    for piece, bits in zip(pieces, begins, strict=True):
        if bits & WORD:
            found.append("")
        found[-1] += piece
    return [word.strip() for word in found]


def shared_words(first: Sequence[str], second: Sequence[str]) -> list[SharedWords]:
    """Runs of equal words in the same order, as :mod:`difflib` finds them.

    In texts of 200 words and more, a word that makes up over 1 % of the second text counts only beside others.
    """
    blocks = SequenceMatcher(None, first, second).get_matching_blocks()
    return [SharedWords(*block) for block in blocks if block.size]
