"""Scorers: from stored values of a response to one number per token, and several scorers as one."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, reduce
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.plugins import build, check_call, name_of
from tokenward.scoring.basic import (
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
    Spans,
    Surprisal,
)
from tokenward.scoring.model_scorers import Activation, Attention, Counterfactual, Similarity
from tokenward.scoring.reads import Value, answer_of, reads_of, scope_of_scores
from tokenward.scoring.steps import Chain, Owners, by_side, widest

How = Literal["sum", "product", "and", "or", "max", "min"]


class Part(NamedTuple):
    """A scorer and what is done to its scores."""

    scorer: Scorer
    chain: Chain


@dataclass(frozen=True)
class Combine:
    """Scores of several scorers, each through its own steps, put together token by token.

    Attributes:
        parts: Tables of ``scorer`` (a table with a name) and ``steps``.
        how: ``sum``, ``product``, ``max``, ``min``; ``and`` and ``or`` take a number that is not 0 as true, and give 0
            or 1. A token that any part gives no score has none.
    """

    parts: tuple[dict[str, Any], ...]
    _: KW_ONLY
    how: How = "sum"

    def __post_init__(self) -> None:
        if not self.parts:
            raise UserError(
                "combine needs parts. Write for example parts: [{scorer: {name: probability}, steps: [...]}]."
            )
        scopes = {part.chain.scope for part in self.made}
        if "batch" in scopes or "dataset" in {scope_of_scores(part.scorer) for part in self.made}:
            raise UserError(
                "the steps of combine work at scope response, comparison or dataset, and a part that needs the data set must "
                "not be a combine itself. Put a step at scope batch into the selection."
            )

    @cached_property
    def made(self) -> tuple[Part, ...]:
        """The parts' scorers and steps."""
        return tuple(_part(written) for written in self.parts)

    @property
    def reads(self) -> tuple[Value, ...]:
        """What any part reads."""
        return tuple(dict.fromkeys(value for part in self.made for value in reads_of(part.scorer)))

    @property
    def scope(self) -> str:
        """Which responses must be seen together: the widest scope of all steps, those of parts included."""
        scopes = [(part.chain.scope, scope_of_scores(part.scorer)) for part in self.made]
        return widest(scope for both in scopes for scope in both)

    def __call__(self, record: Record) -> Tensor:
        """Scores of one response.  -> [n]

        Raises:
            UserError: a step compares with other responses.
        """
        if self.scope != "response":
            raise UserError(
                f"these scores need a whole {self.scope}, not one response: a step of combine has that scope. They are made in "
                "the policy's stage; elsewhere use steps at scope response."
            )
        scores = [part.scorer(record) for part in self.made]  # type: ignore[arg-type]
        device = scores[0].device
        nothing = torch.zeros(len(record.ids), dtype=torch.long, device=device)
        return self.join(scores, Owners(nothing, nothing), torch.ones_like(nothing, dtype=torch.bool))

    def join(self, scores: Sequence[Tensor], owners: Owners, preferred: Tensor) -> Tensor:
        """Scores of each part, of many responses, as one; the sides are compared each with itself.  [n] each -> [n]

        Args:
            scores: Of each part, as its scorer gives them.
            owners: Of the tokens.
            preferred: ``[n]`` bool, whether a token is on the preferred side.
        """
        made = [
            by_side((part.chain, part.chain), found.float().to(preferred.device), owners, preferred)
            for part, found in zip(self.made, scores, strict=True)
        ]
        return reduce(self._two, made[1:], self._first(made[0]))

    def _first(self, scores: Tensor) -> Tensor:
        return scores if self.how not in ("and", "or") else _truth(scores != 0, scores)

    def _two(self, one: Tensor, other: Tensor) -> Tensor:
        if self.how == "sum":
            return one + other
        if self.how == "product":
            return one * other
        if self.how in ("max", "min"):
            return torch.maximum(one, other) if self.how == "max" else torch.minimum(one, other)
        true = (one != 0) & (other != 0) if self.how == "and" else (one != 0) | (other != 0)
        return _truth(true, one + other)


def seeded(table: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A scorer's table, as a recipe has it, in which those that draw have a seed; their own where they have one."""
    found = dict(table)
    if found.get("name") == "random":
        found.setdefault("seed", seed)
    parts = found.get("parts")
    if found.get("name") == "combine" and isinstance(parts, list | tuple):
        found["parts"] = [_seeded_part(part, seed) for part in parts]
    return found


def _seeded_part(part: Any, seed: int) -> Any:
    known = isinstance(part, Mapping) and isinstance(part.get("scorer"), Mapping)
    return {**part, "scorer": seeded(part["scorer"], seed)} if known else part


def scores_together(scorer: Scorer, records: Sequence[Any], owners: Owners, preferred: Tensor) -> Tensor:
    """Scores of responses of which a step of ``combine`` may compare some with others; each by itself otherwise.  -> [n]

    Args:
        scorer: Whose scores.
        records: One per response.
        owners: Of their tokens, end to end.
        preferred: ``[n]`` bool, whether a token is on the preferred side.
    """
    if isinstance(scorer, Combine) and scope_of_scores(scorer) != "response":
        parts = [scores_together(part.scorer, records, owners, preferred) for part in scorer.made]
        return scorer.join(parts, owners, preferred)
    device = preferred.device
    return torch.cat([torch.as_tensor(_checked(scorer, record), device=device).float() for record in records])


def _checked(scorer: Scorer, record: Any) -> Any:
    score, size = answer_of(scorer, record), len(record.ids)
    if torch.as_tensor(score).shape != (size,):
        raise UserError(
            f"the scorer {name_of(scorer)} gave {tuple(torch.as_tensor(score).shape)} numbers for a response of {size} tokens. It must give "
            "one per token."
        )
    return score


def check_scope(scorer: Scorer) -> None:
    """Refuse a scorer of one's own that says it must see several responses: it is called with one.

    Raises:
        UserError: as above.
    """
    if not isinstance(scorer, Combine) and scope_of_scores(scorer) != "response":
        raise UserError(
            f"the scorer {name_of(scorer)} has scope {scope_of_scores(scorer)}, and a scorer is called with one response. Leave scope out, and "
            "compare responses by a step of combine (steps: [{standardise: {scope: comparison}}]) or by the selection."
        )
    for part in scorer.made if isinstance(scorer, Combine) else ():
        check_scope(part.scorer)


def check_in_the_step(scorer: Any) -> None:
    """Refuse a scorer whose scores in the step would depend on more than a comparison.

    Raises:
        UserError: as above.
    """
    check_scope(scorer)
    if scope_of_scores(scorer) not in ("response", "comparison"):
        raise UserError(
            "scores of the policy are made in the step, where a step of combine cannot see all data. Write scope: response, or "
            "comparison."
        )


def _truth(true: Tensor, scores: Tensor) -> Tensor:
    return torch.where(scores.isnan(), torch.nan, true.to(scores.dtype))


def _part(written: Mapping[str, Any]) -> Part:
    unknown = [key for key in written if key not in ("scorer", "steps")]
    table, steps = written.get("scorer"), written.get("steps") or ()
    if (
        unknown
        or not isinstance(table, Mapping)
        or "name" not in table
        or not isinstance(steps, list | tuple)
    ):
        raise UserError(
            f"a part of combine has a scorer, a table with a name, and steps, a list; got {dict(written)}. Write for example "
            "{scorer: {name: probability, of: reference}, steps: [{threshold: {value: 0.95}}]}."
        )
    arguments = {key: value for key, value in table.items() if key != "name"}
    scorer = build("scorer", table["name"], arguments, SCORERS)
    check_call("scorer", table["name"], scorer, ("record",))
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

__all__ = [
    "SCORERS",
    "Activation",
    "Attention",
    "Combine",
    "Counterfactual",
    "Entropy",
    "External",
    "LogProbability",
    "LogRatio",
    "Position",
    "Probability",
    "Random",
    "Rank",
    "Record",
    "Reward",
    "Scorer",
    "Similarity",
    "Spans",
    "Surprisal",
]
