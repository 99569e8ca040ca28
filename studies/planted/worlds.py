"""Token types with hidden scores, and groups of sequences that are ranked by them."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tokenward.tokens.rows import TokenRow
from tokenward.types import Comparison

TYPES, KEYWORDS, K = 50, 10, 5
SHORTEST, LONGEST = 5, 25
PROMPT = TYPES
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class World(NamedTuple):
    """Token types with hidden scores, and a way to write and to judge a sequence.

    Attributes:
        scores: ``[types]``, the planted score of each.
        write: ``f(rng, length)`` gives the types of a sequence.
        judge: ``f(scores of the sequence)`` gives what sequences are ranked by.
    """

    scores: Floats
    write: Callable[[np.random.Generator, int], Ints]
    judge: Callable[[Floats], float]


def smooth(rng: np.random.Generator) -> World:
    """Every type has a normal score, every token is drawn alike, and the mean decides."""
    return World(
        rng.normal(size=TYPES),
        lambda draw, length: draw.integers(0, TYPES, length),
        lambda found: float(found.mean()),
    )


def positive(rng: np.random.Generator) -> World:
    """Every type has a score between 0 and 1, and they add up: long sequences are better."""
    return World(
        rng.random(TYPES),
        lambda draw, length: draw.integers(0, TYPES, length),
        lambda found: float(found.sum()),
    )


def graded(rng: np.random.Generator, sign: float) -> World:
    """Ten types have scores of 0.1 to 1.0 times ``sign``, the others 0; the one furthest from 0 decides.

    It is drawn first, or none is, and as strong or weaker ones are added, each number apart from the length, so
    that neither length nor the number of such tokens gives the rank away. Sequences without any are needed:
    if every one had a keyword, nothing would tell the weakest keyword from the other types.
    """
    marked = rng.permutation(TYPES)[:KEYWORDS]
    scores = np.zeros(TYPES)
    scores[marked] = sign * np.arange(1, KEYWORDS + 1) / KEYWORDS
    plain = np.flatnonzero(scores == 0)

    def write(draw: np.random.Generator, length: int) -> Ints:
        top = int(draw.integers(-1, KEYWORDS))
        if top < 0:
            return draw.choice(plain, length)
        some = marked[draw.integers(0, top + 1, int(draw.integers(0, 4)))]
        rest = draw.choice(plain, length - 1 - len(some))
        return draw.permutation(np.concatenate([[marked[top]], some, rest]))

    return World(scores, write, lambda found: float(sign * np.abs(found).max()))


def present(rng: np.random.Generator) -> World:
    """One type is the keyword; half of the sequences have it, one to three times."""
    keyword = int(rng.integers(TYPES))
    scores = np.zeros(TYPES)
    scores[keyword] = 1.0
    plain = np.flatnonzero(scores == 0)

    def write(draw: np.random.Generator, length: int) -> Ints:
        times = int(draw.integers(1, 4)) * int(draw.random() < 0.5)
        return draw.permutation(np.concatenate([np.full(times, keyword), draw.choice(plain, length - times)]))

    return World(scores, write, lambda found: float(found.max()))


WORLDS: dict[str, Callable[[np.random.Generator], World]] = {
    "mean": smooth,
    "sum": positive,
    "present": present,
    "keyword": lambda rng: graded(rng, 1.0),
    "worst": lambda rng: graded(rng, -1.0),
}


def groups(world: World, rng: np.random.Generator, count: int, k: int = K) -> list[TokenRow]:
    """Groups of ``k`` sequences, their planted scores beside them; groups without any order are drawn again."""
    rows: list[TokenRow] = []
    while len(rows) < count:
        found = [world.write(rng, int(rng.integers(SHORTEST, LONGEST + 1))) for _ in range(k)]
        values = np.array([world.judge(world.scores[ids]) for ids in found])
        ranks = np.unique(-values, return_inverse=True)[1]
        if ranks.max() == 0:
            continue
        name = f"group:{len(rows) + 1}"
        comparison = Comparison(
            key=name, prompt=(), responses=("",) * k, ranks=tuple(ranks.tolist()), source=name
        )
        encoded = TokenRow(comparison, [PROMPT], [ids.tolist() for ids in found], [0] * k)
        rows.append(replace(encoded, scores=[torch.tensor(world.scores[ids]) for ids in found]))
    return rows
