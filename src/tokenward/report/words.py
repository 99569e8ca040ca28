"""Words and sentences of a response as its tokens make them, and the words that two responses share."""

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

import numpy as np

from tokenward.scoring.store import TokenRecord
from tokenward.tokens.segments import Unit, token_segments
from tokenward.tokens.spans import ByteSpan

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
