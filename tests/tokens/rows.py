"""Encoded comparisons made of ids, for tests of what comes after encoding."""

from tokenward.tokens.encode import Encoded
from tokenward.types import Comparison


def encoded(prompt: list[int], *responses: list[int], ranks: tuple[int, ...] | None = None) -> Encoded:
    """A comparison whose ids are given; the first response is the best unless ranks are."""
    ranks = tuple(range(len(responses))) if ranks is None else ranks
    comparison = Comparison(
        key="k",
        prompt=({"role": "user", "content": "q"},),
        responses=tuple(str(index) for index in range(len(responses))),
        ranks=ranks,
        source="test",
    )
    return Encoded(comparison, prompt, list(responses), [True] * len(responses), [1] * len(responses))
