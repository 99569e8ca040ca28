"""The objectives by name, sums of several, and the terms that are used in sums."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from tokenward.config import Named
from tokenward.errors import UserError
from tokenward.objectives.base import Composite, Losses, Objective, needs_of
from tokenward.objectives.custom import CheckedObjective, check_declared
from tokenward.objectives.listwise import PlackettLuce
from tokenward.objectives.pairwise import (
    DPO,
    IPO,
    ORPO,
    Pairwise,
    SePO,
    SimPO,
    log_ratios,
    sides,
    sums,
)
from tokenward.objectives.responses import KTO, SFT, Reinforce, WeightedLikelihood
from tokenward.objectives.selected import Selected
from tokenward.objectives.token_pairs import TBPO, TDPO, SparsePO
from tokenward.ops.losses import pair_weight, treg
from tokenward.ops.ragged import segment_sum, weighted_sum
from tokenward.plugins import build, check_call, check_positive, validated
from tokenward.selection import selector_of
from tokenward.tokens.batches import Needs, TokenBatch


@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class TReg:
    """T-REG's regulariser (arXiv 2412.02685): token rewards as signed weights, strongest for wrongly ordered pairs.

    ``-s beta sum_t w_t log pi(y_t)`` over both responses, with ``s = sigma(r_l - r_w)`` and ``r`` beta times the log-ratio,
    summed over the tokens with weight. The weights are the paper's token rewards: ``sigma(.) - 1/2`` of a contrast of two
    prompts. T-REG itself is a ``sum`` of ``dpo`` and this term with its own selection.

    Attributes:
        beta: As in the DPO term.
        stop_gradient: ``weight``: ``s`` has no gradient; ``none``: it has. The paper does not say which.
    """

    needs: ClassVar[Needs] = Needs(reference=True, pairwise=True)

    beta: float = 0.1
    stop_gradient: Literal["weight", "none"] = "weight"

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        present = (batch.weights != 0).to(batch.weights.dtype)
        ratio = weighted_sum(log_ratios(logp, batch), present, batch.response, batch.responses)
        weight = pair_weight(*sides(ratio), beta=self.beta)
        if self.stop_gradient == "weight":
            weight = weight.detach()
        loss = treg(weight, *sides(sums(logp, batch)), beta=self.beta)
        return Losses(loss, {"pair_weight": weight.detach()})


@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class TokenKL:
    """KL divergence between policy and reference over the whole vocabulary, summed over tokens.

    Attributes:
        direction: ``forward``: KL(reference || policy), as in TDPO; ``reverse``: KL(policy || reference), as in TIS-DPO.
        sides: ``both``: the sum over all responses, which keeps the policy near the reference. ``difference``: that of the
            rejected response minus that of the chosen one, for pairs.
        stop_gradient: For ``difference``: ``chosen``: the chosen response's divergence has no gradient; ``none``: it has.
        weighted: Multiply by the absolute weights, or count every token with weight as 1.
    """

    direction: Literal["forward", "reverse"] = "forward"
    sides: Literal["both", "difference"] = "both"
    stop_gradient: Literal["chosen", "none"] = "none"
    weighted: bool = True

    def __post_init__(self) -> None:
        if self.sides == "both" and self.stop_gradient == "chosen":
            raise UserError(
                "stop_gradient: chosen is for sides: difference; in the sum over both sides it would only drop the chosen "
                "one. Write sides: difference, or leave stop_gradient out.",
                code="conflicting-settings",
            )

    @property
    def needs(self) -> Needs:
        pairs = self.sides == "difference"
        return Needs(kl=self.direction, pairwise=pairs, unpaired=None if pairs else "all")

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        weights = batch.weights.abs()
        if not self.weighted:
            weights = (weights != 0).to(weights.dtype)
        kl = weighted_sum(batch.statistics["kl"], weights, batch.response, batch.responses)
        total = segment_sum(kl, batch.comparison, batch.comparisons)
        metrics = {"kl": total.detach()}
        if self.sides == "both":
            return Losses(total, metrics)
        chosen, rejected = sides(kl)
        return Losses(rejected - (chosen.detach() if self.stop_gradient == "chosen" else chosen), metrics)


class _Term(NamedTuple):
    """One term of a sum."""

    name: str
    factor: float
    objective: Objective


@dataclass(kw_only=True)
@validated
class Sum(Composite):
    """A weighted sum of objectives.

    The metrics hold each term's loss as ``loss/NAME``; if two terms have a metric of the same name, the first one's is kept.

    Attributes:
        terms: One table per term: ``name`` and settings of an objective, ``factor`` (1 by default), and optionally
            ``selection``, a selector that computes the term's weights from the stored scores, among the tokens to which the
            policy's selection gives weight.
        seed: Seed of these selections unless they have one; in a recipe it is the recipe's.
    """

    terms: list[dict[str, Any]]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.terms:
            raise UserError(
                "a sum needs terms. Write for example terms: [{name: dpo}, {name: token_kl, factor: 0.1}].",
                code="missing-setting",
            )
        self._terms = [_term(number, table, self.seed) for number, table in enumerate(self.terms, start=1)]
        super().__init__([term.objective for term in self._terms])
        if self.needs.own_denominator and len(self._terms) > 1:
            name = next(term.name for term in self._terms if needs_of(term.objective).own_denominator)
            raise UserError(
                f"the term {name} of the sum divides by a sum over the whole optimizer step, which the other terms do not share: "
                f"a step has one denominator. Give {name} a normaliser of each comparison (weights, length), or use it alone.",
                code="conflicting-settings",
            )

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        total = torch.zeros(batch.comparisons, dtype=logp.dtype, device=logp.device)
        metrics: dict[str, Tensor] = {}
        having: dict[str, Tensor] = {}
        denominator: Tensor | None = None
        for name, factor, objective in self._terms:
            found = objective(logp, batch)
            total = total + factor * found.loss
            denominator = found.denominator  # only a sum of one term can have one
            having |= {key: value for key, value in (found.having or {}).items() if key not in metrics}
            metrics = {f"loss/{name}": found.loss.detach(), **found.metrics, **metrics}
        return Losses(total, metrics, denominator, having or None)


def _term(number: int, table: Mapping[str, Any], seed: int) -> _Term:
    settings = dict(table)
    name, factor = settings.pop("name", None), settings.pop("factor", 1.0)
    selection = settings.pop("selection", None)
    if not isinstance(name, str) or not isinstance(factor, int | float):
        raise UserError(
            f"term {number} of the sum is {dict(table)}. Write a table with a name and a number as factor, such as "
            "{name: token_kl, factor: 0.1}.",
            code="invalid-value",
        )
    objective = objective_of("objective", Named(name=name, arguments=settings), seed)
    if selection is not None:
        if not isinstance(selection, Mapping) or not isinstance(selection.get("name"), str):
            raise UserError(
                f"the selection of the sum's term {name} is {selection!r}. Write a table with a name, such as "
                "selection: {name: top_fraction}.",
                code="invalid-value",
            )
        arguments = {key: value for key, value in selection.items() if key != "name"}
        objective = Selected(objective, selector_of(Named(name=selection["name"], arguments=arguments), seed))
    return _Term(name, float(factor), objective)


def objective_of(kind: str, table: Named, seed: int = 0) -> Objective:
    """Build the objective of a recipe's table; ``seed`` is used by a sum that has none.

    Raises:
        UserError: The name is unknown, a setting is wrong, or a custom objective reads what it does not declare.
    """
    arguments = {"seed": seed, **table.arguments} if table.name == "sum" else table.arguments
    objective = build(kind, table.name, arguments, OBJECTIVES)
    return objective if table.name in OBJECTIVES else custom_objective(kind, table.name, objective)


def custom_objective(kind: str, name: str, objective: Objective) -> Objective:
    """A custom objective whose signature is checked now, and whose results are checked in the first step.

    Raises:
        UserError: It cannot be called with ``logp`` and ``batch``, or it reads what it does not declare.
    """
    check_call(kind, name, objective, ("logp", "batch"))
    checked = CheckedObjective(objective, name)
    check_declared(checked)
    return checked


OBJECTIVES: dict[str, type] = {
    "dpo": DPO,
    "ipo": IPO,
    "kto": KTO,
    "orpo": ORPO,
    "pairwise": Pairwise,
    "plackett_luce": PlackettLuce,
    "reinforce": Reinforce,
    "sepo": SePO,
    "sft": SFT,
    "simpo": SimPO,
    "sparsepo": SparsePO,
    "sum": Sum,
    "tbpo": TBPO,
    "tdpo": TDPO,
    "token_kl": TokenKL,
    "treg": TReg,
    "weighted_likelihood": WeightedLikelihood,
}
