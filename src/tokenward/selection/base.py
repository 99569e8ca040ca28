"""What a selector receives and returns."""

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from tokenward.scoring.steps import Owners

EosSides = Literal["both", "chosen", "rejected", "none"]
"""Sides whose end-of-turn tokens are eligible."""


class ScoredTokens(NamedTuple):
    """The concatenated scored tokens of some responses: ``n`` tokens of ``r`` responses.

    Attributes:
        scores: ``[n]`` float, any real number; NaN is no score.
        response: ``[n]``, index of the response that owns each token; indices rise with the tokens.
        comparison: ``[r]``, index of the comparison that owns each response.
        rank: ``[r]``; 0 is the preferred side, anything else the rejected side.
        eos: ``[n]`` bool, whether the token is an end-of-turn token.
        seeds: ``[r]`` int64, a stable number of each response for selectors that draw.
        segment: ``[n]`` or None, index of the word, sentence or span of each token, rising with the tokens. It is only
            there for selectors that declare a ``unit``.
        joint: ``[n]`` or None, number of each token's segment in its response, if the scores came from the tokens of another
            tokenizer. A selector never gets it: to a selector each segment is one token, and all its tokens get the weight.
    """

    scores: Tensor
    response: Tensor
    comparison: Tensor
    rank: Tensor
    eos: Tensor
    seeds: Tensor
    segment: Tensor | None = None
    joint: Tensor | None = None

    @property
    def preferred(self) -> Tensor:
        """Whether each token is on the preferred side.  -> [n] bool"""
        return (self.rank == 0)[self.response]

    @property
    def owners(self) -> Owners:
        """The response, comparison and segment of each token."""
        return Owners(self.response, self.comparison[self.response], self.segment)


class Selector(Protocol):
    """Turns scores into weights.

    A selector may declare, as class attributes or properties:

    - ``scope``: which responses it compares. ``response`` (the default) and ``comparison``: it may be called with any number
      of whole comparisons. ``dataset``: it is called once with all training data. ``batch``: it is called in each training
      step with the comparisons of that step.
    - ``signed = True``: weights may be negative.
    - ``unit``: ``word``, ``sentence`` or ``spans``; it then receives ``tokens.segment``.
    """

    def __call__(self, tokens: ScoredTokens) -> Tensor:
        """A finite weight for each token; 0 removes it, and it is not negative unless the selector is ``signed``.  -> [n]

        Args:
            tokens: Scores of whole comparisons, and what each token belongs to.
        """
        ...


def scope_of(selector: Selector) -> str:
    """Which responses a selector compares: ``response``, ``comparison``, ``batch`` or ``dataset``."""
    return str(getattr(selector, "scope", "response"))


def is_signed(selector: Selector) -> bool:
    """Whether a selector's weights may be negative."""
    return bool(getattr(selector, "signed", False))


def unit_of(selector: Selector) -> str:
    """The segments that a selector needs; empty if it needs none."""
    return str(getattr(selector, "unit", ""))


def eligible(tokens: ScoredTokens, eos: EosSides) -> Tensor:
    """Whether each token has a score and is not an end-of-turn token of a side that ``eos`` leaves out.  -> [n] bool"""
    preferred = tokens.preferred
    allowed = {
        "both": torch.ones_like(preferred),
        "none": torch.zeros_like(preferred),
        "chosen": preferred,
        "rejected": ~preferred,
    }[eos]
    return ~tokens.scores.isnan() & (allowed | ~tokens.eos)
