"""The scorers by name, and the one that combines several."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, reduce
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.plugins import build, check_call, name_of, validated
from tokenward.scoring.basic import (
    Activation,
    Attention,
    Counterfactual,
    Entropy,
    External,
    LogProbability,
    LogRatio,
    Position,
    Probability,
    Random,
    Rank,
    Record,
    Reward,
    Scorer,
    Similarity,
    Spans,
    Surprisal,
)
from tokenward.scoring.reads import Value, reads_of, scope_of_scores, scores_of
from tokenward.scoring.steps import Chain, Owners, by_side, widest


class Part(NamedTuple):
    """One of the scorers of :class:`Combine`, with the steps that its scores go through."""

    scorer: Scorer
    chain: Chain


@dataclass(frozen=True)
@validated
class Combine:
    """Combines the scores of several scorers token by token, after steps of their own.

    Attributes:
        parts: One table per scorer: ``scorer``, a table with ``name`` and settings, and optionally ``steps``, a list as
            in the selector ``transform``.
        how: ``sum``, ``product``, ``max`` or ``min``; ``and`` and ``or`` treat nonzero scores as true and return 0 or 1.
            A token without a score (NaN) in one part has no score.
    """

    parts: tuple[dict[str, Any], ...]
    _: KW_ONLY
    how: Literal["sum", "product", "and", "or", "max", "min"] = "sum"

    def __post_init__(self) -> None:
        if not self.parts:
            raise UserError(
                "combine needs parts. Write for example parts: [{scorer: {name: probability}, steps: [...]}].",
                code="missing-setting",
            )
        scopes = {part.chain.scope for part in self.members}
        if "batch" in scopes or "dataset" in {scope_of_scores(part.scorer) for part in self.members}:
            raise UserError(
                "the steps of combine must have scope response, comparison or dataset, and a part cannot itself be a combine "
                "with scope dataset. Move a step with scope batch to the selection.",
                code="unsupported-scope",
            )

    @cached_property
    def members(self) -> tuple[Part, ...]:
        """The scorers and steps that ``parts`` describes."""
        return tuple(map(_build_part, self.parts))

    @property
    def reads(self) -> tuple[Value, ...]:
        return tuple(dict.fromkeys(value for part in self.members for value in reads_of(part.scorer)))

    @property
    def scope(self) -> str:
        """The widest scope of all steps, including those of nested parts."""
        return widest(
            scope for part in self.members for scope in (part.chain.scope, scope_of_scores(part.scorer))
        )

    def __call__(self, record: Record) -> Tensor:
        if self.scope != "response":
            raise UserError(
                f"a step of combine has scope {self.scope}, so one response cannot be scored by itself. Scores of this scope "
                "are only available for training; elsewhere use steps with scope response.",
                code="unsupported-scope",
            )
        scores = [scores_of(part.scorer, record) for part in self.members]
        owner = torch.zeros(len(record.ids), dtype=torch.long, device=scores[0].device)
        return self.join(scores, Owners(owner, owner), torch.ones_like(owner, dtype=torch.bool))

    def join(self, scores: Sequence[Tensor], owners: Owners, preferred: Tensor) -> Tensor:
        """Combine the scores ``[n]`` of each part, after its steps on each side of the comparisons.  -> [n]"""
        stepped = [
            by_side((part.chain, part.chain), found.float().to(preferred.device), owners, preferred)
            for part, found in zip(self.members, scores, strict=True)
        ]
        if self.how in ("and", "or"):
            stepped = [torch.where(found.isnan(), torch.nan, (found != 0).float()) for found in stepped]
        operators = {
            "sum": torch.add,
            "product": torch.mul,
            "min": torch.minimum,
            "and": torch.minimum,
            "max": torch.maximum,
            "or": torch.maximum,
        }
        return reduce(operators[self.how], stepped)


def scores_together(scorer: Scorer, records: Sequence[Any], owners: Owners, preferred: Tensor) -> Tensor:
    """Scores of several responses, which the steps of a :class:`Combine` may compare with each other.  -> [n]"""
    if isinstance(scorer, Combine) and scope_of_scores(scorer) != "response":
        parts = [scores_together(part.scorer, records, owners, preferred) for part in scorer.members]
        return scorer.join(parts, owners, preferred)
    return torch.cat([scores_of(scorer, record).to(preferred.device) for record in records])


def seeded(table: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A scorer's table in which every ``random`` scorer has a seed: its own, or this one."""
    found = dict(table)
    if found.get("name") == "random":
        found.setdefault("seed", seed)
    parts = found.get("parts")
    if found.get("name") == "combine" and isinstance(parts, list | tuple):
        found["parts"] = [
            {**part, "scorer": seeded(part["scorer"], seed)} if _has_scorer(part) else part for part in parts
        ]
    return found


def check_scope(scorer: Scorer) -> None:
    """Check that no custom scorer declares a scope, since a scorer is called with one response.

    Raises:
        UserError: One does.
    """
    if isinstance(scorer, Combine):
        for part in scorer.members:
            check_scope(part.scorer)
    elif scope_of_scores(scorer) != "response":
        raise UserError(
            f"the scorer {name_of(scorer)} has scope {scope_of_scores(scorer)}, but a scorer is called with one response. Remove "
            "scope, and compare responses with a step of combine (steps: [{standardise: {scope: comparison}}]) or in the selection.",
            code="unsupported-scope",
        )


def check_in_the_step(scorer: Any) -> None:
    """Check that a scorer of the policy compares no responses beyond one comparison; errors as in :func:`check_scope`."""
    check_scope(scorer)
    if scope_of_scores(scorer) not in ("response", "comparison"):
        raise UserError(
            "scores of the policy are computed in each training step, which does not see all data. Use scope response or "
            "comparison in the steps of combine.",
            code="unsupported-scope",
        )


def _has_scorer(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("scorer"), Mapping)


def _build_part(table: Mapping[str, Any]) -> Part:
    steps = table.get("steps") or ()
    known = _has_scorer(table) and "name" in table["scorer"] and isinstance(steps, list | tuple)
    if not known or set(table) - {"scorer", "steps"}:
        raise UserError(
            f"a part of combine has a scorer, which is a table with a name, and a list of steps; got {dict(table)}. Write for "
            "example {scorer: {name: probability, of: reference}, steps: [{threshold: {value: 0.95}}]}.",
            code="invalid-value",
        )
    arguments = dict(table["scorer"])
    name = arguments.pop("name")
    scorer = build("scorer", name, arguments, SCORERS)
    check_call("scorer", name, scorer, ("record",))
    return Part(scorer, Chain.of(steps))


SCORERS: dict[str, Any] = {
    "log_ratio": LogRatio,
    "log_probability": LogProbability,
    "probability": Probability,
    "surprisal": Surprisal,
    "entropy": Entropy,
    "rank": Rank,
    "position": Position,
    "random": Random,
    "reward": Reward,
    "spans": Spans,
    "external": External,
    "attention": Attention,
    "similarity": Similarity,
    "activation": Activation,
    "counterfactual": Counterfactual,
    "combine": Combine,
}
