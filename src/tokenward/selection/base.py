"""What a selector receives and returns."""

from typing import NamedTuple, Protocol

from torch import Tensor


class ScoredTokens(NamedTuple):
    """Scores of the tokens of some responses, laid end to end.

    Attributes:
        scores: ``[n]`` float, any real number.
        response: ``[n]``, which response owns the token; responses are numbered in order.
        comparison: ``[r]``, which comparison owns the response.
        rank: ``[r]``; 0 is the preferred side, everything else the rejected side.
        closing: ``[n]`` bool, whether the token is the end-of-turn token and no text.
        seeds: ``[r]`` int64, a stable number of each response, for selectors that draw.
    """

    scores: Tensor
    response: Tensor
    comparison: Tensor
    rank: Tensor
    closing: Tensor
    seeds: Tensor


class Selector(Protocol):
    """Scores to weights.

    Attributes:
        scope: Which responses it must see together; ``response`` where a class of one's own does not say. ``response`` and ``comparison`` selectors look at one of those at a time, ``dataset`` ones
            at all of the training data, ``batch`` ones at the comparisons that are trained together.
    """

    @property
    def scope(self) -> str: ...

    def __call__(self, tokens: ScoredTokens) -> Tensor:
        """Weight of each token, float >= 0.  -> [n]"""
        ...


def scope_of(selector: Selector) -> str:
    """Which responses a selector must see together."""
    return str(getattr(selector, "scope", "response"))
