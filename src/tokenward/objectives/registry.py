"""Objectives by name, and the sum of several."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from tokenward.config import Named
from tokenward.errors import UserError
from tokenward.objectives.base import Composite, Losses, Objective, needs_of
from tokenward.objectives.custom import CheckedObjective, check_declared
from tokenward.objectives.kto import KTO
from tokenward.objectives.likelihood import SFT, WeightedLikelihood
from tokenward.objectives.listwise import PlackettLuce
from tokenward.objectives.pairwise import DPO, IPO, ORPO, Pairwise, SePO, SimPO
from tokenward.objectives.reinforce import Reinforce
from tokenward.objectives.selected import Selected
from tokenward.objectives.sparse import SparsePO
from tokenward.objectives.tbpo import TBPO
from tokenward.objectives.tdpo import TDPO
from tokenward.objectives.terms import TokenKL, TReg
from tokenward.plugins import build, check_call
from tokenward.selection import selector_of
from tokenward.tokens.batches import TokenBatch


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
