"""Steps in a row, as a recipe writes them: ``[{affine: {scale: 0.5, shift: 1}}, exp]``."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.plugins import build, check_call
from tokenward.scoring.group_steps import (
    BeyondShorter,
    Cluster,
    Cut,
    MinMax,
    RankScale,
    SegmentPool,
    Standardise,
    Top,
)
from tokenward.scoring.steps import SCOPES, Affine, Clamp, Decay, Exp, Owners, Relu, Scope, Sigmoid, Step

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
