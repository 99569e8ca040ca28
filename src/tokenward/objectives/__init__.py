"""Objectives: one loss per comparison from per-token log-probabilities and weights."""

from tokenward.objectives.base import (
    Composite,
    Losses,
    Objective,
    ObjectiveModule,
    needs_of,
    title_of,
)
from tokenward.objectives.custom import CheckedObjective
from tokenward.objectives.listwise import PlackettLuce
from tokenward.objectives.pairwise import DPO, IPO, ORPO, Pairwise, SePO, SimPO
from tokenward.objectives.registry import OBJECTIVES, Sum, TokenKL, TReg, custom_objective, objective_of
from tokenward.objectives.responses import KTO, SFT, Reinforce, WeightedLikelihood
from tokenward.objectives.selected import Selected
from tokenward.objectives.token_pairs import TBPO, TDPO, SparsePO
from tokenward.tokens.batches import Needs

__all__ = [
    "DPO", "IPO", "KTO", "OBJECTIVES", "ORPO", "SFT", "TBPO", "TDPO", "CheckedObjective", "Composite",
    "Losses", "Needs", "Objective", "ObjectiveModule", "Pairwise", "PlackettLuce", "Reinforce", "SePO",
    "Selected", "SimPO", "SparsePO", "Sum", "TReg", "TokenKL", "WeightedLikelihood",
    "custom_objective", "needs_of", "objective_of", "title_of",
]  # fmt: skip
