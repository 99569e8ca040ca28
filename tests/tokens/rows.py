"""Comparisons made of ids, for tests of what comes after encoding."""

from tokenward.tokens.rows import TokenRow
from tokenward.types import Comparison


def encoded(prompt: list[int], *responses: list[int], ranks: tuple[int, ...] | None = None) -> TokenRow:
    """A comparison whose ids are given; the first response is the best unless ranks are."""
    ranks = tuple(range(len(responses))) if ranks is None else ranks
    comparison = Comparison(
        key="k",
        prompt=({"role": "user", "content": "q"},),
        responses=tuple(str(index) for index in range(len(responses))),
        ranks=ranks,
        source="test",
    )
    return TokenRow(comparison, prompt, list(responses), [1] * len(responses))
