"""What a selector receives and returns."""

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

EosSides = Literal["both", "chosen", "rejected", "none"]
"""Whose end-of-turn tokens a selector looks at."""


class ScoredTokens(NamedTuple):
    """Scores of the tokens of some responses, laid end to end.

    Attributes:
        scores: ``[n]`` float, any real number.
        response: ``[n]``, which response owns the token; responses are numbered in order.
        comparison: ``[r]``, which comparison owns the response.
        rank: ``[r]``; 0 is the preferred side, everything else the rejected side.
        eos: ``[n]`` bool, whether the token is the end-of-turn token and no text.
        seeds: ``[r]`` int64, a stable number of each response, for selectors that draw.
        segment: ``[n]`` or None, the word, sentence or span that owns the token, numbered in order; there for
            selectors that name a ``unit``.
    """

    scores: Tensor
    response: Tensor
    comparison: Tensor
    rank: Tensor
    eos: Tensor
    seeds: Tensor
    segment: Tensor | None = None


class Selector(Protocol):
    """Scores to weights.

    Attributes:
        scope: Which responses it must see together; ``response`` where a class of one's own does not say. ``response`` and ``comparison`` selectors look at one of those at a time, ``dataset`` ones
            at all of the training data, ``batch`` ones at the comparisons that are trained together.

    It may also say ``signed = True``, where weights below 0 are meant, and ``unit = "word"``, ``"sentence"`` or
    ``"spans"``, where it needs to know which of these owns a token (``tokens.segment``).
    """

    @property
    def scope(self) -> str: ...

    def __call__(self, tokens: ScoredTokens) -> Tensor:
        """Weight of each token, float >= 0 unless it is ``signed``.  -> [n]"""
        ...


def scope_of(selector: Selector) -> str:
    """Which responses a selector must see together."""
    return str(getattr(selector, "scope", "response"))


def is_signed(selector: Selector) -> bool:
    """Whether a selector's weights may be below 0."""
    return bool(getattr(selector, "signed", False))


def unit_of(selector: Selector) -> str:
    """Which segments a selector needs to know; empty where it needs none."""
    return str(getattr(selector, "unit", ""))


def eligible(tokens: ScoredTokens, eos: EosSides) -> Tensor:
    """Whether each token has a score and, where it closes its turn, is on a side whose ends count.  -> [n] bool"""
    preferred = (tokens.rank == 0)[tokens.response]
    whose = {
        "both": torch.ones_like(preferred),
        "none": torch.zeros_like(preferred),
        "chosen": preferred,
        "rejected": ~preferred,
    }[eos]
    return ~tokens.scores.isnan() & (whose | ~tokens.eos)
