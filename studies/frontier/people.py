"""A reward that people taught: what each word is worth to those who compared replies.

A logistic regression tells the preferred reply of a pair from the other by the share of each word among all their words. A reply's
reward is the mean worth of its words, which is what the regression compares: it has no length effect, and the worth of every word is
known.

    python -m studies.frontier.people FILE

prints how often that agrees with the people, on pairs that it did not learn from, and the words with the largest worths.
"""

import argparse
import hashlib
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

from tokenward.data.files import jsonl_rows
from tokenward.evaluation.statistics import mean_figure

WORD = re.compile(r"[a-z']+")
SEEN, STRENGTH, PARTS = 5, 10.0, 5
"""In how many replies a word must be, the inverse of the ridge's factor, and the parts of the cross-validation."""


class Compared(NamedTuple):
    """A prompt in the format of Anthropic's HH, up to the last ``Assistant:``, and two replies."""

    prompt: str
    chosen: str
    rejected: str


@cache
def comparisons(file: Path) -> list[Compared]:
    """The pairs of a file whose replies share their prompt and are not empty."""
    found = []
    for _, row in jsonl_rows(file):
        chosen, rejected = (_parted(str(row[side])) for side in ("chosen", "rejected"))
        if chosen[0] == rejected[0] and chosen[1].strip() and rejected[1].strip():
            found.append(Compared(chosen[0], chosen[1], rejected[1]))
    return found


def _parted(transcript: str) -> tuple[str, str]:
    before, last, reply = transcript.rpartition("\n\nAssistant:")
    return before + last, reply


def digest(file: Path) -> str:
    """Of the file's bytes."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


@cache
def worths(file: Path) -> dict[str, float]:
    """What each word is worth, from all pairs of a file, with the largest size 1."""
    counter, differences, sides = _differences(comparisons(file))
    weights = _regression().fit(differences, sides).coef_[0]
    weights = weights / np.abs(weights).max()
    return dict(zip(counter.get_feature_names_out(), weights.tolist(), strict=True))


def agreement(file: Path) -> np.ndarray:
    """Whether worths of words learned from four fifths of the pairs prefer what people preferred, for each pair of the last fifth.  -> [n]"""
    _, differences, sides = _differences(comparisons(file))
    return cross_val_predict(_regression(), differences, sides, cv=PARTS) == sides


def _regression() -> LogisticRegression:
    return LogisticRegression(C=STRENGTH, fit_intercept=False, max_iter=500)


def _differences(pairs: Sequence[Compared]) -> tuple[CountVectorizer, csr_matrix, np.ndarray]:
    """Differences of the words' shares between two replies; every second pair is turned round, so that there are two classes."""
    counter = CountVectorizer(min_df=SEEN, token_pattern=WORD.pattern)
    replies = [reply for pair in pairs for reply in (pair.chosen, pair.rejected)]
    words = np.array([max(len(WORD.findall(reply.lower())), 1) for reply in replies])
    shares = csr_matrix(counter.fit_transform(replies).multiply(1 / words[:, None]))
    sides = np.where(np.arange(len(pairs)) % 2, -1, 1)
    return counter, csr_matrix((shares[0::2] - shares[1::2]).multiply(sides[:, None])), sides


def reward(file: Path) -> Callable[[str], float]:
    """Mean worth of the words of a text; a word that was seldom seen is worth nothing."""
    known = worths(file)

    def mean(text: str) -> float:
        found = [known.get(word, 0.0) for word in WORD.findall(text.lower())]
        return float(np.mean(found)) if found else 0.0

    return mean


def main() -> None:
    """Print the agreement and the words."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("file", type=Path, help="compared replies in HH's format")
    file = made.parse_args().file
    found, words = mean_figure(agreement(file)), sorted(worths(file).items(), key=lambda item: item[1])
    print(f"agrees on {found.value:.3f} [{found.low:.3f}, {found.high:.3f}] of {found.n} pairs")
    for name, part in (("highest", words[:-11:-1]), ("lowest", words[:10])):
        print(f"{name}: " + ", ".join(f"{word} {worth:+.2f}" for word, worth in part))


if __name__ == "__main__":
    main()
