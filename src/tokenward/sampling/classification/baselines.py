"""Prompts that were not learned, to compare with."""

import random
from collections.abc import Collection

from tokenward.errors import UserError


def random_prompts(
    vocabulary_size: int, length: int, count: int, seed: int, excluded: Collection[int] = ()
) -> list[list[int]]:
    """Prompts of tokens drawn uniformly; two may be the same by chance.

    Args:
        vocabulary_size: Ids are below it.
        length: Tokens of each prompt, >= 1.
        count: How many prompts.
        seed: The same one gives the same prompts.
        excluded: Ids that are never drawn, such as the tokenizer's special ones.

    Raises:
        UserError: no id is left to draw, or a number is out of its range.
    """
    if length < 1 or count < 1:
        raise UserError(f"random prompts: length {length} and count {count} must be at least 1.")
    allowed = sorted(set(range(vocabulary_size)) - set(excluded))
    if not allowed:
        raise UserError(
            f"random prompts: all {vocabulary_size} ids of the vocabulary are excluded. Exclude only special ids."
        )
    draw = random.Random(seed)
    return [draw.choices(allowed, k=length) for _ in range(count)]
