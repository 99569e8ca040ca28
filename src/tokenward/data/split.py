"""Stable random splits: the side of a row depends on its content and the seed, not on its position."""

import hashlib
import json
from array import array
from collections.abc import Iterable

from tokenward.errors import UserError
from tokenward.types import Comparison


def check_eval_share(share: float) -> None:
    """Raises a UserError if a share of eval rows is not in [0, 1)."""
    if not 0 <= share < 1:
        raise UserError(
            f"the share of eval rows must be in [0, 1), got {share}. Use 0.1 for 10% of the prompts.",
            code="out-of-range",
            key="data.eval",
        )


def is_eval(comparison: Comparison, share: float, seed: int) -> bool:
    """Whether a comparison is an eval row. All comparisons of a prompt are on the same side.

    The share is met on average, and no row moves when others are added.
    """
    if not share:
        return False
    prompt = json.dumps([[message["role"], message["content"]] for message in comparison.prompt])
    return uniform("split", seed, prompt) < share


def fraction_places(keys: Iterable[str], share: float, seed: int, salt: str = "") -> list[int]:
    """Positions of a random part of some comparisons. A smaller share is a subset of a larger one.

    Args:
        keys: Keys of the comparisons.
        share: The share to keep, in (0, 1], met on average. At least one comparison is kept if there is any.
        seed: Seed of the choice.
        salt: A different salt for each use makes the choices independent.

    Raises:
        UserError: ``share`` is out of range.
    """
    if not 0 < share <= 1:
        raise UserError(
            f"fraction must be in (0, 1], got {share}. Use 0.3 to keep 30% of the comparisons.",
            code="out-of-range",
        )
    places = array("d", (uniform("fraction", seed, salt, key) for key in keys))
    kept = [number for number, place in enumerate(places) if place < share]
    if kept or not places:
        return kept
    return [places.index(min(places))]  # the one that the smallest sufficient share would keep


def uniform(*parts: str | int) -> float:
    """A number in [0, 1) that depends on the parts alone, by a hash."""
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return int(digest[:13], 16) / 16**13  # 52 bits: more could round up to 1
