"""Steps that compare a token with others: its response's, its comparison's, or all of the data."""

from dataclasses import KW_ONLY, dataclass
from typing import Literal

from torch import Tensor

from tokenward.errors import UserError
from tokenward.ops import transforms
from tokenward.ops.selection import CountRule
from tokenward.scoring.steps import Owners, Scope
from tokenward.tokens.segments import Unit


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
