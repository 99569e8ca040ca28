"""Steps that turn scores into other scores, and chains of them as a recipe writes them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.ops import transforms
from tokenward.ops.selection import CountRule
from tokenward.plugins import build, check_call, check_fraction, check_positive, validated
from tokenward.tokens.segments import Unit

Scope = Literal["response", "comparison", "batch", "dataset"]
SCOPES: tuple[Scope, ...] = ("response", "comparison", "batch", "dataset")
"""Which tokens are compared with each other, from narrow to wide. A batch is an optimizer step."""


class Owners(NamedTuple):
    """Which response, comparison and segment each token belongs to.

    Attributes:
        response: ``[n]``, index of the token's response; indices rise with the tokens.
        comparison: ``[n]``, index of its comparison.
        segment: ``[n]`` or None, index of its word, sentence or span; indices rise with the tokens.
    """

    response: Tensor
    comparison: Tensor
    segment: Tensor | None = None

    def groups(self, scope: Scope) -> tuple[Tensor, int]:
        """Index of each token's group at a scope, ``[n]``, and the number of groups."""
        if scope in ("batch", "dataset"):
            return torch.zeros_like(self.response), 1
        owner = self.response if scope == "response" else self.comparison
        return owner, int(owner.max()) + 1 if len(owner) else 0


class Step(Protocol):
    """Turns scores into other scores.

    A step that compares tokens beyond one response declares it as ``scope``, one of :data:`SCOPES`; the default is
    ``response``.
    """

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        """New scores, one per token.  -> [n]

        Args:
            scores: ``[n]`` float32 of one side's tokens, NaN at tokens without a score. Those have none afterwards either,
                whatever the step returns for them.
            owners: What each token belongs to.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class Affine:
    """``scale * s + shift``."""

    scale: float = 1.0
    shift: float = 0.0

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        return transforms.affine(scores, self.scale, self.shift)


@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class Clamp:
    """Limits scores to ``low`` and ``high``; None is no limit."""

    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        low, high = self.low, self.high
        if (low is None and high is None) or (low is not None and high is not None and low > high):
            raise UserError(
                f"clamp needs low <= high, or one of the two, got low {low} and high {high}.",
                code="out-of-range",
            )

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        return transforms.clamp(scores, self.low, self.high)


@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class Exp:
    """``exp(s / temperature)``; a negative temperature reverses the order."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature == 0:
            raise UserError("exp needs a temperature other than 0, such as 1.0.", code="out-of-range")

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        return transforms.exponential(scores, self.temperature)


@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class Sigmoid:
    """``sigma(s) + shift``."""

    shift: float = 0.0

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        return transforms.shifted_sigmoid(scores, self.shift)


@dataclass(frozen=True, slots=True)
class Relu:
    """``max(s, 0)``."""

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        return scores.relu()


@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class Decay:
    """``rate ** (t + first) * s`` at position ``t`` of a response; D2PO's code has ``first: 1``."""

    rate: float = 0.98
    first: int = 0

    def __post_init__(self) -> None:
        check_positive(rate=self.rate)

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        return transforms.decay(scores, owners.response, self.rate, self.first)


@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class RankScale:
    """Replaces scores by their rank, scaled from ``low`` for the lowest to ``high`` for the highest."""

    low: float = 0.0
    high: float = 1.0
    scope: Scope = "response"

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        return transforms.rank_scale(scores, *owners.groups(self.scope), self.low, self.high)


@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class Standardise:
    """Subtracts the mean and divides by the standard deviation."""

    scope: Scope = "response"

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        return transforms.standardise(scores, *owners.groups(self.scope))


@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class MinMax:
    """Scales scores to [0, 1], from the lowest to the highest."""

    scope: Scope = "response"

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        return transforms.min_max(scores, *owners.groups(self.scope))


@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class Top:
    """1 for a fraction of the tokens, those with the largest or smallest scores, else 0.

    Attributes:
        fraction: The fraction in (0, 1]; the count is exact.
        which: ``largest`` or ``smallest``.
        count: Rounding, as in the selector ``top_fraction``.
        minimum: Lowest number of tokens kept in each group.
        scope: Which tokens form a group.
    """

    fraction: float = 0.3
    which: Literal["largest", "smallest"] = "largest"
    count: CountRule = "floor"
    minimum: int = 1
    scope: Scope = "response"

    def __post_init__(self) -> None:
        check_fraction("fraction", self.fraction)

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        rules: dict[str, Any] = {"which": self.which, "rule": self.count, "minimum": self.minimum}
        return transforms.top(scores, *owners.groups(self.scope), self.fraction, **rules)


@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class Cut:
    """1 on one side of a threshold, else 0.

    Attributes:
        at: ``value``, ``mean``, ``median``, ``quantile``, ``iqr`` or ``otsu``; see
            :func:`tokenward.ops.transforms.threshold_of`.
        keep: ``below`` is strict; ``above`` includes the threshold.
        value: The threshold for ``at: value``, or the share for ``at: quantile``.
        factor: Interquartile ranges below the first quartile for ``at: iqr``; negative: above the third.
        classes: Number of classes for ``at: otsu``.
        cut: Index of the cut for ``at: otsu``, 0 is the lowest.
        scope: Which tokens the threshold is computed from.
    """

    at: transforms.At = "value"
    keep: Literal["above", "below"] = "above"
    value: float | None = None
    factor: float = 1.5
    classes: int = 2
    cut: int = 0
    scope: Scope = "response"

    def __post_init__(self) -> None:
        if self.at in ("value", "quantile") and self.value is None:
            raise UserError(f"at: {self.at} needs a value, such as value: 0.5.", code="missing-setting")
        if self.at == "quantile" and not 0 <= (self.value or 0.0) <= 1:
            raise UserError(
                f"at: quantile needs a value in [0, 1], got {self.value}. Write 0.6 for 60 %.",
                code="out-of-range",
            )
        if self.at == "otsu" and not 0 <= self.cut < self.classes - 1:
            raise UserError(
                f"at: otsu with classes: {self.classes} has the cuts 0 to {self.classes - 2}, got cut: {self.cut}.",
                code="out-of-range",
            )

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        group, groups = owners.groups(self.scope)
        thresholds = transforms.threshold_of(
            scores, group, groups, self.at,
            value=self.value or 0.0, factor=self.factor, classes=self.classes, cut=self.cut,
        )  # fmt: skip
        return transforms.keep_side(scores, group, thresholds, self.keep)


@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class BeyondShorter:
    """Multiplies by ``rate`` the positions beyond the comparison's shortest response (LD-DPO, arXiv 2409.06411)."""

    scope: ClassVar[Scope] = "comparison"

    rate: float = 0.5

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        return transforms.beyond_shorter(scores, owners.response, owners.comparison, self.rate)


@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class Cluster:
    """1 for the tokens in some of the classes found by multi-Otsu, else 0.

    Attributes:
        classes: Number of classes.
        keep: Indices of the classes that get 1; 0 has the lowest scores.
        scope: Which tokens are clustered together.
    """

    classes: int = 2
    keep: tuple[int, ...] = (1,)
    scope: Scope = "response"

    def __post_init__(self) -> None:
        if self.classes < 2 or not set(self.keep) <= set(range(self.classes)):
            raise UserError(
                f"cluster needs 2 or more classes and keep from 0 to classes - 1, got {self.classes} and {[*self.keep]}.",
                code="out-of-range",
            )

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        return transforms.cluster(scores, *owners.groups(self.scope), self.classes, self.keep)


@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class SegmentPool:
    """One number per word, sentence or span of the data.

    Attributes:
        segment: ``word``, ``sentence`` or ``spans``; ``token`` changes nothing.
        how: ``mean``, ``sum``, ``max`` or ``min`` of the segment's scores.
        place: ``all``: every token of the segment gets the number. ``end``, ``start``: the last or first token, and the
            others get 0.
    """

    segment: Unit = "sentence"
    how: transforms.Pool = "mean"
    place: Literal["all", "end", "start"] = "all"

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        if self.segment == "token":
            return scores
        if owners.segment is None:
            raise UserError(
                f"segment_pool needs the {self.segment} of each token, which is only known to a selection on stored scores. Use the "
                "step in the selection, with a scorer that does not read the policy.",
                code="missing-segments",
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
"""A step in a recipe: its name, or a table of one name with its settings."""


@dataclass(frozen=True)
class Chain:
    """Steps that are applied one after another, with their names in the recipe for messages."""

    steps: tuple[Step, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, written: Sequence[Written]) -> "Chain":
        """Build the steps of a recipe.

        Raises:
            UserError: A name or setting is unknown, or a table names several steps.
        """
        named = [_name_and_settings(item) for item in written]
        steps = [build("step", name, settings, STEPS) for name, settings in named]
        for (name, _), step in zip(named, steps, strict=True):
            check_call("step", name, step, ("scores", "owners"))
        return cls(tuple(steps), tuple(name for name, _ in named))

    @property
    def scope(self) -> Scope:
        """The widest scope of the steps."""
        return widest(getattr(step, "scope", "response") for step in self.steps)

    @property
    def unit(self) -> str:
        """The kind of segments that the steps pool over; empty if none does."""
        units = {step.segment for step in self.steps if isinstance(step, SegmentPool)} - {"token"}
        if len(units) > 1:
            raise UserError(
                f"the steps pool over {' and '.join(sorted(units))}, but only one kind of segment is available. Keep one.",
                code="conflicting-settings",
            )
        return next(iter(units), "")

    def __call__(self, scores: Tensor, owners: Owners) -> Tensor:
        """Scores after all steps; a token without a score (NaN) keeps none.  [n] -> [n]

        Raises:
            UserError: A custom step returned anything but one number per token.
        """
        missing = scores.isnan()
        for step, name in zip(self.steps, self.names, strict=True):
            found = torch.as_tensor(step(scores, owners), dtype=scores.dtype, device=scores.device)
            if found.shape != scores.shape:
                raise UserError(
                    f"the step {name} returned shape {list(found.shape)} for {len(scores)} tokens. Return one number per token.",
                    code="wrong-result",
                )
            scores = torch.where(missing, torch.nan, found)
        return scores


def widest(scopes: Iterable[str]) -> Scope:
    """The widest of some scopes, ``response`` if there are none.

    Raises:
        UserError: One is unknown, or both ``batch`` and ``dataset`` occur.
    """
    found = set(scopes)
    unknown = found - set(SCOPES)
    if unknown:
        raise UserError(
            f"there is no scope {min(unknown)!r}. Choose one of {', '.join(SCOPES)}.", code="unknown-name"
        )
    if {"batch", "dataset"} <= found:
        raise UserError(
            "scope batch and scope dataset cannot be combined: weights are computed either in each training step or once for "
            "all data. Choose one of the two.",
            code="conflicting-settings",
        )
    for scope in reversed(SCOPES):
        if scope in found:
            return scope
    return "response"


def by_side(chains: tuple[Chain, Chain], scores: Tensor, owners: Owners, preferred: Tensor) -> Tensor:
    """Apply the first chain to the tokens of the preferred side and the second to the others.  -> [n]

    Tokens of one side never see those of the other. ``preferred [n]`` is the side of each token.
    """
    # NaN leaves the other side's tokens out of every statistic.
    sides = (torch.where(side, scores, torch.nan) for side in (preferred, ~preferred))
    chosen, rejected = (chain(side, owners) for chain, side in zip(chains, sides, strict=True))
    return torch.where(preferred, chosen, rejected)


def _name_and_settings(item: Written) -> tuple[str, Mapping[str, Any]]:
    if isinstance(item, str):
        return item, {}
    if len(item) != 1:
        raise UserError(
            f"a step is a name, or a table of one name with its settings, got {item}. Write for example "
            "[{affine: {scale: 0.5, shift: 1}}, exp].",
            code="invalid-value",
        )
    ((name, settings),) = item.items()
    if not isinstance(settings, Mapping | None):
        raise UserError(
            f"the settings of the step {name} must be a table, got {settings!r}. Write {{{name}: {{...}}}}.",
            code="invalid-value",
        )
    return name, settings or {}
