"""Objectives by name, sums of several, and the terms that only add to another objective."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

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
    positive,
    sides,
    sums,
)
from tokenward.objectives.responses import KTO, SFT, Reinforce, WeightedLikelihood
from tokenward.objectives.selected import Selected
from tokenward.objectives.token_pairs import TBPO, TDPO, SparsePO
from tokenward.ops.losses import pair_weight, treg
from tokenward.ops.ragged import segment_sum, weighted_sum
from tokenward.plugins import build, check_call
from tokenward.selection import selector_of
from tokenward.tokens.batches import Needs, TokenBatch


@dataclass(frozen=True, slots=True)
class TReg:
    """T-REG's regulariser (arXiv 2412.02685): make tokens more or less likely by their weights, wrong pairs most.

    ``-s beta sum_t w_t log pi(y_t)`` over both responses, with ``s = sigma(r_l - r_w)`` and ``r`` beta times the
    log-ratio, summed over the tokens that have weight. The weights are signed: the paper's token rewards,
    ``sigma(.) - 1/2`` of a contrast of two prompts. T-REG itself is a sum of ``dpo`` and this with its own selection.

    Attributes:
        beta: As in the DPO term beside it.
        stop_gradient: ``weight``: ``s`` is a number; ``none``: it has its gradient. What is known of the paper
            does not say which.
    """

    needs: ClassVar[Needs] = Needs(reference=True, pairwise=True)

    _: KW_ONLY
    beta: float = 0.1
    stop_gradient: Literal["weight", "none"] = "weight"

    def __post_init__(self) -> None:
        positive("beta", self.beta, 0.1)

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch of pairs; see :class:`tokenward.objectives.base.Objective`."""
        present = (batch.weights != 0).to(batch.weights.dtype)
        ratio = weighted_sum(log_ratios(logp, batch), present, batch.response, batch.responses)
        weight = pair_weight(*sides(ratio), beta=self.beta)
        if self.stop_gradient == "weight":
            weight = weight.detach()
        loss = treg(weight, *sides(sums(logp, batch)), beta=self.beta)
        return Losses(loss, {"pair_weight": weight.detach()})


@dataclass(frozen=True, slots=True)
class TokenKL:
    """KL divergence between policy and reference over the whole vocabulary, summed over tokens.

    Attributes:
        direction: ``forward``: KL(reference || policy), as TDPO; ``reverse``: KL(policy || reference), as TIS-DPO.
        sides: ``both``: the sum over all responses, which keeps the policy near the reference. ``difference``: that
            of the rejected response less that of the chosen one, of pairs.
        stop_gradient: ``chosen``: the best response's divergence has no gradient; ``none``.
        weighted: Count each token by the size of its weight, or every token that has weight as 1.
    """

    _: KW_ONLY
    direction: Literal["forward", "reverse"] = "forward"
    sides: Literal["both", "difference"] = "both"
    stop_gradient: Literal["chosen", "none"] = "none"
    weighted: bool = True

    def __post_init__(self) -> None:
        if self.sides == "both" and self.stop_gradient == "chosen":
            raise UserError(
                "stop_gradient: chosen is for sides: difference; in the sum over both sides it would only leave the chosen "
                "one out. Write sides: difference, or leave stop_gradient out."
            )

    @property
    def needs(self) -> Needs:
        """The divergence; a sum over responses may be over one, and a difference is one of pairs."""
        difference = self.sides == "difference"
        return Needs(kl=self.direction, pairwise=difference, unpaired=None if difference else "all")

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch; see :class:`tokenward.objectives.base.Objective`."""
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


@dataclass
class Sum(Composite):
    """A weighted sum of objectives.

    Attributes:
        terms: Each a table: ``name`` and settings of an objective, ``factor`` (1 by default), and ``selection``, a
            selector of its own that makes the term's weights from the stored scores, among the tokens to which the
            policy's selection gave weight.
        seed: Of selections that draw, unless they have their own; in a recipe it is the recipe's.
    """

    _: KW_ONLY
    terms: list[dict[str, Any]]
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.terms:
            raise UserError("a sum needs terms. Write terms: [{name: dpo}, {name: token_kl, factor: 0.1}].")
        self._terms = [_term(number, table, self.seed) for number, table in enumerate(self.terms, start=1)]
        super().__init__([objective for _, _, objective in self._terms])
        if self.needs.own_denominator and len(self._terms) > 1:
            own = next(name for name, _, term in self._terms if needs_of(term).own_denominator)
            raise UserError(_two_denominators(own))

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch; see :class:`tokenward.objectives.base.Objective`.

        Each term's own is in the metrics as ``loss/NAME``; where two terms have a metric of one name, the first shows.
        """
        total = torch.zeros(batch.comparisons, dtype=logp.dtype, device=logp.device)
        metrics: dict[str, Tensor] = {}
        denominator: Tensor | None = None
        having: dict[str, Tensor] = {}
        for name, factor, objective in self._terms:
            found = objective(logp, batch)
            total = total + factor * found.loss
            denominator = found.denominator  # of the only term, where there is one
            shown = {key: value for key, value in (found.having or {}).items() if key not in metrics}
            metrics = {f"loss/{name}": found.loss.detach(), **found.metrics, **metrics}
            having |= shown
        return Losses(total, metrics, denominator, having or None)


def _two_denominators(name: str) -> str:
    return (
        f"the sum's term {name} divides by a sum over the whole optimizer step, and the terms beside it do not divide by the same: "
        f"one step has one denominator. Give {name} a normaliser of each comparison's own (weights, length), or use it "
        "without a sum."
    )


def _term(number: int, table: Mapping[str, Any], seed: int) -> tuple[str, float, Objective]:
    settings = dict(table)
    name, factor = settings.pop("name", None), settings.pop("factor", 1.0)
    selection = settings.pop("selection", None)
    if not isinstance(name, str) or not isinstance(factor, int | float):
        raise UserError(
            f"term {number} of the sum is {dict(table)}. Write a table with a name and a number as its factor: "
            "{name: token_kl, factor: 0.1}."
        )
    objective = objective_of("objective", Named(name=name, arguments=settings), seed)
    if selection is None:
        return name, float(factor), objective
    if not isinstance(selection, Mapping) or not isinstance(selection.get("name"), str):
        raise UserError(
            f"the selection of the sum's term {name} is {selection!r}. Write a table with a name: "
            "selection: {name: top_fraction}."
        )
    arguments = {key: value for key, value in selection.items() if key != "name"}
    selector = selector_of(Named(name=selection["name"], arguments=arguments), seed)
    return name, float(factor), Selected(objective, selector)


def objective_of(kind: str, table: Named, seed: int = 0) -> Objective:
    """The objective that a recipe's table names; the seed of a sum is the recipe's unless it has one.

    Raises:
        UserError: there is none of this name, or its settings are wrong.
    """
    arguments = {"seed": seed, **table.arguments} if table.name == "sum" else table.arguments
    objective = build(kind, table.name, arguments, OBJECTIVES)
    if table.name in OBJECTIVES:
        return objective
    check_call(kind, table.name, objective, ("logp", "batch"))
    made = CheckedObjective(objective, table.name)
    check_declared(made)
    return made


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
