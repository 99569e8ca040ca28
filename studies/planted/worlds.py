"""Token types with hidden scores, and groups of sequences ranked by them."""

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
    """Token types with hidden scores, and functions that write and rank sequences.

    Attributes:
        scores: ``[types]``, planted score of each type.
        write: ``f(rng, length)`` returns the types of a sequence.
        judge: ``f(scores of the sequence)`` returns the number that sequences are ranked by.
    """

    scores: Floats
    write: Callable[[np.random.Generator, int], Ints]
    judge: Callable[[Floats], float]


def smooth(rng: np.random.Generator) -> World:
    """Normal scores; tokens are drawn uniformly; ranked by the mean."""
    return World(
        rng.normal(size=TYPES),
        lambda draw, length: draw.integers(0, TYPES, length),
        lambda found: float(found.mean()),
    )


def positive(rng: np.random.Generator) -> World:
    """Scores between 0 and 1; ranked by the sum, so longer sequences are better."""
    return World(
        rng.random(TYPES),
        lambda draw, length: draw.integers(0, TYPES, length),
        lambda found: float(found.sum()),
    )


def graded(rng: np.random.Generator, sign: float) -> World:
    """Ten types have scores of 0.1 to 1.0 times ``sign``, the others 0; ranked by the score furthest from 0.

    The extreme token is drawn first, or none is. Tokens that are as strong or weaker are added. Their number is
    independent of the length, so neither reveals the rank. Some sequences have no such token: otherwise nothing
    would distinguish the weakest keyword from the other types.
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
    """One type is the keyword, which occurs one to three times in half of the sequences."""
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
    """Groups of ``k`` sequences with their planted scores. Groups whose sequences all tie are drawn again."""
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
