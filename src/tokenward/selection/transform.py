"""Scores through steps to weights: every selection that is a chain of small formulas."""

from dataclasses import KW_ONLY, dataclass
from functools import cached_property

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.scoring.steps import Chain, Owners, Scope, Written, by_side, widest
from tokenward.selection.base import EosSides, ScoredTokens, eligible


@dataclass(frozen=True)
class Transform:
    """Weights that steps make of scores, each side by itself.

    A token that has no score, or is not eligible, is left out of every statistic and gets weight 0.

    Attributes:
        steps: Of both sides; see :data:`tokenward.scoring.steps.STEPS`.
        chosen: In their place for the preferred response.
        rejected: In their place for the others.
        eos: Whose end-of-turn tokens are eligible.
        signed: Whether weights below 0 are meant; without it they are refused.
    """

    _: KW_ONLY
    steps: tuple[Written, ...] = ()
    chosen: tuple[Written, ...] | None = None
    rejected: tuple[Written, ...] | None = None
    eos: EosSides = "both"
    signed: bool = False

    def __post_init__(self) -> None:
        # What cannot be made is refused here, not at the first batch.
        unit, scope = self.unit, self.scope
        if unit and scope == "batch":
            raise UserError(
                f"segment_pool of {unit} does not go together with a step at scope batch: batches do not know their "
                "words. Write another scope."
            )

    @cached_property
    def _chains(self) -> tuple[Chain, Chain]:
        chosen, rejected = (self.steps if side is None else side for side in (self.chosen, self.rejected))
        return Chain.of(chosen), Chain.of(rejected)

    @property
    def scope(self) -> Scope:
        """The widest of its steps' scopes."""
        return widest(chain.scope for chain in self._chains)

    @property
    def unit(self) -> str:
        """What the segments are that a step pools over."""
        return Chain(
            tuple(step for chain in self._chains for step in chain.steps),
            tuple(name for chain in self._chains for name in chain.names),
        ).unit

    def __call__(self, tokens: ScoredTokens) -> Tensor:
        """Weights.  -> [n] float32"""
        owners = Owners(tokens.response, tokens.comparison[tokens.response], tokens.segment)
        preferred = (tokens.rank == 0)[tokens.response]
        scores = torch.where(eligible(tokens, self.eos), tokens.scores.float(), torch.nan)
        weights = by_side(self._chains, scores, owners, preferred)
        return torch.where(weights.isnan(), 0.0, weights)
