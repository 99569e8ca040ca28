"""Steps: what is done to scores one after another, each named in a recipe with its settings.

Here are those that look at one token at a time; those that compare tokens are in :mod:`tokenward.scoring.group_steps`.
"""

from dataclasses import KW_ONLY, dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.ops import transforms

Scope = Literal["response", "comparison", "batch", "dataset"]
SCOPES: tuple[Scope, ...] = ("response", "comparison", "batch", "dataset")
"""Which tokens are looked at together, the narrowest first."""


class Owners(NamedTuple):
    """Which tokens belong together.

    Attributes:
        response: ``[n]``, the response that owns the token; responses are numbered in order.
        comparison: ``[n]``, the comparison that owns it.
        segment: ``[n]`` or None, the word, sentence or span that owns it, numbered in order.
    """

    response: Tensor
    comparison: Tensor
    segment: Tensor | None = None

    def groups(self, scope: Scope) -> tuple[Tensor, int]:
        """Which group each token is in, and how many groups there are.  -> [n]"""
        if scope in ("batch", "dataset"):
            return torch.zeros_like(self.response), 1
        owner = self.response if scope == "response" else self.comparison
        return owner, int(owner.max()) + 1 if len(owner) else 0


class Step(Protocol):
    """Scores to scores. One may have a ``scope``; without it a token's number depends on its own response alone."""

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        """New scores; a token whose score is NaN has none and must keep it.  [n] -> [n]"""
        ...


@dataclass(frozen=True, slots=True)
class Affine:
    """``scale * s + shift``."""

    _: KW_ONLY
    scale: float = 1.0
    shift: float = 0.0

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        """See :func:`tokenward.ops.transforms.affine`."""
        return transforms.affine(scores, self.scale, self.shift)


@dataclass(frozen=True, slots=True)
class Clamp:
    """No lower than ``low``, no higher than ``high``; a bound that is left out is none."""

    _: KW_ONLY
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        low, high = self.low, self.high
        if (low is None and high is None) or (low is not None and high is not None and low > high):
            raise UserError(f"clamp needs low <= high, or one of the two, got low {low} and high {high}.")

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        """See :func:`tokenward.ops.transforms.clamp`."""
        return transforms.clamp(scores, self.low, self.high)


@dataclass(frozen=True, slots=True)
class Exp:
    """``exp(s / temperature)``; a negative temperature turns the order round."""

    _: KW_ONLY
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature == 0:
            raise UserError("exp needs a temperature that is not 0. Write for example 1.0.")

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        """See :func:`tokenward.ops.transforms.exponential`."""
        return transforms.exponential(scores, self.temperature)


@dataclass(frozen=True, slots=True)
class Sigmoid:
    """``sigma(s) + shift``."""

    _: KW_ONLY
    shift: float = 0.0

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        """See :func:`tokenward.ops.transforms.shifted_sigmoid`."""
        return transforms.shifted_sigmoid(scores, self.shift)


@dataclass(frozen=True, slots=True)
class Relu:
    """The score where it is greater than 0, else 0."""

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        """Scores of 0 or more."""
        return scores.relu()


@dataclass(frozen=True, slots=True)
class Decay:
    """``rate ** (t + first) * s`` at place t of a response.

    Attributes:
        rate: Greater than 0.
        first: Exponent of the first token; D2PO's code begins with 1.
    """

    _: KW_ONLY
    rate: float = 0.98
    first: int = 0

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise UserError(f"decay needs a rate greater than 0, got {self.rate}. Write for example 0.98.")

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        """See :func:`tokenward.ops.transforms.decay`."""
        return transforms.decay(scores, owners.response, self.rate, self.first)
