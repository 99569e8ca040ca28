"""Parts of a data set that stay put: a row's side depends on its content and the seed, not its position."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tokenward.errors import UserError
from tokenward.types import Comparison


class Split(NamedTuple):
    """Comparisons to train on and comparisons to judge by."""

    train: list[Comparison]
    eval: list[Comparison]


def split(comparisons: Sequence[Comparison], *, share: float, seed: int) -> Split:
    """Part the comparisons by a hash of the prompt, so that those of one prompt stay together.

    The share is met on average; no row moves when others are added.

    Args:
        comparisons: What to part.
        share: The share to hold out, in [0, 1).
        seed: Another seed gives another split.

    Raises:
        UserError: ``eval`` is out of range.
    """
    check_eval_share(share)
    parts = Split([], [])
    for comparison in comparisons:
        held = is_eval(comparison, share, seed)
        (parts.eval if held else parts.train).append(comparison)
    return parts


def check_eval_share(share: float) -> None:
    """Refuse a share to hold out that is not in [0, 1)."""
    if not 0 <= share < 1:
        raise UserError(f"data.eval must be in [0, 1), got {share}. Use 0.1 to hold out 10% of the prompts.")


def is_eval(comparison: Comparison, share: float, seed: int) -> bool:
    """On which side of :func:`split` a comparison stands."""
    prompt = json.dumps([[message["role"], message["content"]] for message in comparison.prompt])
    return uniform("split", seed, prompt) < share


def fraction(comparisons: Sequence[Comparison], share: float, seed: int, salt: str = "") -> list[Comparison]:
    """A random part of the comparisons, chosen by key; a smaller share is inside a larger one.

    Args:
        comparisons: What to choose from; the order is kept.
        share: The share to keep, in (0, 1], met on average; at least one comparison is kept if there is any.
        seed: Another seed gives another choice.
        salt: So does another salt: give each use its own to make them independent.

    Raises:
        UserError: ``share`` is out of range.
    """
    kept = fraction_places((comparison.key for comparison in comparisons), share, seed, salt)
    return [comparisons[place] for place in kept]


def fraction_places(keys: Iterable[str], share: float, seed: int, salt: str = "") -> list[int]:
    """Where the comparisons stand that :func:`fraction` keeps, given the keys of all."""
    if not 0 < share <= 1:
        raise UserError(f"fraction must be in (0, 1], got {share}. Use 0.3 to keep 30% of the comparisons.")
    places = array("d", (uniform("fraction", seed, salt, key) for key in keys))
    kept = [number for number, place in enumerate(places) if place < share]
    if kept or not places:
        return kept
    return [places.index(min(places))]  # the one that the smallest sufficient share would keep


def uniform(*parts: str | int) -> float:
    """A number in [0, 1) that depends on the parts alone: a hash, so that no row's place depends on another's."""
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return int(digest[:13], 16) / 16**13  # 52 bits: all that a float below 1 holds without rounding up to 1
