"""Steps that turn scores into other scores, and chains of them as a recipe writes them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.ops import transforms
from tokenward.ops.selection import CountRule
from tokenward.plugins import build, check_call
from tokenward.tokens.segments import Unit

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


@dataclass(frozen=True, slots=True)
class RankScale:
    """By rank alone, from ``low`` for the lowest to ``high`` for the highest."""

    _: KW_ONLY
    low: float = 0.0
    high: float = 1.0
    scope: Scope = "response"

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        """See :func:`tokenward.ops.transforms.rank_scale`."""
        return transforms.rank_scale(scores, *owners.groups(self.scope), self.low, self.high)


@dataclass(frozen=True, slots=True)
class Standardise:
    """Less the mean, over the standard deviation."""

    _: KW_ONLY
    scope: Scope = "response"

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        """See :func:`tokenward.ops.transforms.standardise`."""
        return transforms.standardise(scores, *owners.groups(self.scope))


@dataclass(frozen=True, slots=True)
class MinMax:
    """From 0, the least, to 1, the largest."""

    _: KW_ONLY
    scope: Scope = "response"

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        """See :func:`tokenward.ops.transforms.min_max`."""
        return transforms.min_max(scores, *owners.groups(self.scope))


@dataclass(frozen=True, slots=True)
class Top:
    """1 for a share of the tokens, the largest or the smallest, else 0.

    Attributes:
        fraction: The share, in (0, 1], exact.
        which: Which end.
        count: Rounding, as in the selector ``top_fraction``.
        minimum: At least so many of each group.
        scope: Among which tokens.
    """

    _: KW_ONLY
    fraction: float = 0.3
    which: Literal["largest", "smallest"] = "largest"
    count: CountRule = "floor"
    minimum: int = 1
    scope: Scope = "response"

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UserError(f"top: fraction must be in (0, 1], got {self.fraction}. Write 0.3 for 30 %.")

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        """See :func:`tokenward.ops.transforms.top`."""
        rules = {"which": self.which, "rule": self.count, "minimum": self.minimum}
        return transforms.top(scores, *owners.groups(self.scope), self.fraction, **rules)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Cut:
    """1 on one side of a threshold, else 0.

    Attributes:
        at: ``value``, ``mean``, ``median``, ``quantile``, ``iqr`` or ``otsu``; see
            :func:`tokenward.ops.transforms.threshold_of`.
        keep: ``below`` is strict; ``above`` is the rest.
        value: The number of ``at: value``, or the share of ``at: quantile``.
        factor: Interquartile ranges of ``at: iqr``; negative counts up from the third quartile.
        classes: Of ``at: otsu``.
        cut: Which of its cuts, 0 the lowest.
        scope: Among which tokens.
    """

    _: KW_ONLY
    at: transforms.At = "value"
    keep: Literal["above", "below"] = "above"
    value: float | None = None
    factor: float = 1.5
    classes: int = 2
    cut: int = 0
    scope: Scope = "response"

    def __post_init__(self) -> None:
        if self.at in ("value", "quantile") and self.value is None:
            raise UserError(f"at: {self.at} needs a value. Write for example value: 0.5.")
        if self.at == "quantile" and not 0 <= (self.value or 0.0) <= 1:
            raise UserError(f"a quantile lies in [0, 1], got value: {self.value}. Write 0.6 for 60 %.")
        if self.at == "otsu" and not 0 <= self.cut < self.classes - 1:
            raise UserError(
                f"at: otsu with classes: {self.classes} has the cuts 0 to {self.classes - 2}, got cut: {self.cut}."
            )

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        """See :func:`tokenward.ops.transforms.keep_side`."""
        group, groups = owners.groups(self.scope)
        settings = {
            "value": self.value or 0.0,
            "factor": self.factor,
            "classes": self.classes,
            "cut": self.cut,
        }
        found = transforms.threshold_of(scores, group, groups, self.at, **settings)  # type: ignore[arg-type]
        return transforms.keep_side(scores, group, found, self.keep)


@dataclass(frozen=True, slots=True)
class BeyondShorter:
    """Times ``rate`` from the place on at which the shortest response of the comparison has ended (LD-DPO, arXiv 2409.06411)."""

    _: KW_ONLY
    rate: float = 0.5
    scope: Scope = "comparison"

    def __post_init__(self) -> None:
        if self.scope != "comparison":
            raise UserError(
                f"beyond_shorter compares the responses of one comparison, got scope: {self.scope}. Leave scope out."
            )

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        """See :func:`tokenward.ops.transforms.beyond_shorter`."""
        return transforms.beyond_shorter(scores, owners.response, owners.comparison, self.rate)


@dataclass(frozen=True, slots=True)
class Cluster:
    """1 for the tokens in some of the classes that multi-Otsu makes, else 0.

    Attributes:
        classes: How many.
        keep: Numbers of the classes, 0 the lowest.
        scope: Among which tokens.
    """

    _: KW_ONLY
    classes: int = 2
    keep: tuple[int, ...] = (1,)
    scope: Scope = "response"

    def __post_init__(self) -> None:
        if self.classes < 2 or not set(self.keep) <= set(range(self.classes)):
            raise UserError(
                f"cluster with classes: {self.classes} has the classes 0 to {self.classes - 1}, got keep: {list(self.keep)}. "
                "At least 2 classes are needed."
            )

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        """See :func:`tokenward.ops.transforms.cluster`."""
        return transforms.cluster(scores, *owners.groups(self.scope), self.classes, self.keep)


@dataclass(frozen=True, slots=True)
class SegmentPool:
    """One number per word, sentence or span of the data.

    Attributes:
        segment: ``word``, ``sentence`` or ``spans``.
        how: ``mean``, ``sum``, ``max`` or ``min`` of the segment's scores.
        place: At ``all`` its tokens, or at its ``end`` or ``start`` alone and 0 at the others.
    """

    _: KW_ONLY
    segment: Unit = "sentence"
    how: transforms.Pool = "mean"
    place: Literal["all", "end", "start"] = "all"

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        """See :func:`tokenward.ops.transforms.segment_pool`."""
        if self.segment == "token":
            return scores
        if owners.segment is None:
            raise UserError(
                f"segment_pool needs to know which {self.segment} a token is in, which only the selection of a run on "
                "stored scores knows. Put the step into policy.selection, with a scorer that is not online."
            )
        return transforms.segment_pool(scores, owners.segment, self.how, self.place)


STEPS: dict[str, type] = {
    "affine": Affine,
    "clamp": Clamp,
    "exp": Exp,
    "sigmoid": Sigmoid,
    "relu": Relu,
    "rank_scale": RankScale,
    "standardise": Standardise,
    "min_max": MinMax,
    "top": Top,
    "threshold": Cut,
    "cluster": Cluster,
    "segment_pool": SegmentPool,
    "decay": Decay,
    "beyond_shorter": BeyondShorter,
}
Written = str | dict[str, Any]
"""A step in a recipe: its name, or a table of one key, the name, with its settings."""


@dataclass(frozen=True)
class Chain:
    """Steps that are carried out one after another.

    Attributes:
        steps: In their order.
        names: As the recipe has them, for messages.
    """

    steps: tuple[Step, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, written: Sequence[Written]) -> "Chain":
        """The steps that a recipe names.

        Raises:
            UserError: an unknown name or setting, or a table of several steps.
        """
        named = [_named(item) for item in written]
        return cls(tuple(_step(*item) for item in named), tuple(name for name, _ in named))

    @property
    def scope(self) -> Scope:
        """Which tokens must be looked at together."""
        return widest(getattr(step, "scope", "response") for step in self.steps)

    @property
    def unit(self) -> str:
        """What the segments are of which a step makes one number each; empty where none does."""
        units = {step.segment for step in self.steps if isinstance(step, SegmentPool)} - {"token"}
        if len(units) > 1:
            raise UserError(
                f"the steps pool {' and '.join(sorted(units))}; a token is in one kind of segment. Keep one."
            )
        return next(iter(units), "")

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        """Scores after all steps; a token without score (NaN) keeps none.  [n] -> [n]

        Raises:
            UserError: a step of one's own returned anything but one number per token.
        """
        missing = scores.isnan()
        for step, name in zip(self.steps, self.names, strict=True):
            found = torch.as_tensor(step(scores, owners), dtype=scores.dtype, device=scores.device)
            if found.shape != scores.shape:
                raise UserError(
                    f"the step {name} returned {list(found.shape)} numbers for {len(scores)} tokens. It must return one each."
                )
            scores = torch.where(missing, torch.nan, found)
        return scores


def widest(scopes: Iterable[str]) -> Scope:
    """The scope that holds all of these.

    Raises:
        UserError: one that is not known, or both ``batch`` and ``dataset``: a batch is never the whole data.
    """
    found = set(scopes)
    unknown = found - set(SCOPES)
    if unknown:
        raise UserError(f"there is no scope {sorted(unknown)[0]!r}. Write one of {', '.join(SCOPES)}.")
    if {"batch", "dataset"} <= found:
        raise UserError(
            "steps at scope batch and at scope dataset do not go together: the weights are made either at every step of the "
            "training or once for all data. Write one of the two."
        )
    for scope in reversed(SCOPES):
        if scope in found:
            return scope
    return "response"


def by_side(chains: tuple[Chain, Chain], scores: Tensor, owners: Owners, preferred: Tensor) -> Tensor:
    """Each side's scores after its own steps, which see the tokens of that side alone.  [n] -> [n]

    Args:
        chains: Of the preferred side and of the other.
        scores: ``[n]``.
        owners: Of the tokens.
        preferred: ``[n]`` bool, whether the token is on the preferred side.
    """
    sides = (torch.where(side, scores, torch.nan) for side in (preferred, ~preferred))
    chosen, rejected = (chain(side, owners) for chain, side in zip(chains, sides, strict=True))
    return torch.where(preferred, chosen, rejected)


def _named(item: Written) -> tuple[str, Mapping[str, Any]]:
    if isinstance(item, str):
        return item, {}
    if len(item) != 1:
        raise UserError(
            f"a step is a name or a table of one name with its settings, got {item}. Write for example "
            "[{affine: {scale: 0.5, shift: 1}}, exp]."
        )
    ((name, arguments),) = item.items()
    if not isinstance(arguments, Mapping | None):
        raise UserError(
            f"step {name}: got {arguments!r} where a table of settings belongs. Write {{{name}: {{...}}}}."
        )
    return name, arguments or {}


def _step(name: str, arguments: Mapping[str, Any]) -> Step:
    made = build("step", name, arguments, STEPS)
    check_call("step", name, made, ("scores", "owners"))
    return made
