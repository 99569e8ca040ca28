"""Objectives: per-token log-probabilities and weights to one loss per comparison."""

from tokenward.objectives.base import (
    Auxiliary,
    Composite,
    Losses,
    Objective,
    has_own_denominator,
    is_pairwise,
    needs_entropy,
    needs_frozen_reference,
    needs_kl,
    needs_reference,
    needs_scores,
    needs_token_rank,
    title_of,
    unpaired_of,
)
from tokenward.objectives.checked import CheckedObjective
from tokenward.objectives.guidance import Reinforce
from tokenward.objectives.kto import KTO
from tokenward.objectives.likelihood import SFT, WeightedLikelihood
from tokenward.objectives.listwise import PlackettLuce
from tokenward.objectives.pairwise import DPO, IPO, ORPO, Pairwise, SePO, SimPO
from tokenward.objectives.registry import OBJECTIVES, Sum, objective_of
from tokenward.objectives.selected import Selected
from tokenward.objectives.sparse import SparsePO
from tokenward.objectives.tbpo import TBPO
from tokenward.objectives.tdpo import TDPO
from tokenward.objectives.terms import TokenKL, TReg

__all__ = [
    "DPO",
    "IPO",
    "KTO",
    "OBJECTIVES",
    "ORPO",
    "SFT",
    "TBPO",
    "TDPO",
    "Auxiliary",
    "CheckedObjective",
    "Composite",
    "Losses",
    "Objective",
    "Pairwise",
    "PlackettLuce",
    "Reinforce",
    "SePO",
    "Selected",
    "SimPO",
    "SparsePO",
    "Sum",
    "TReg",
    "TokenKL",
    "WeightedLikelihood",
    "has_own_denominator",
    "is_pairwise",
    "needs_entropy",
    "needs_frozen_reference",
    "needs_kl",
    "needs_reference",
    "needs_scores",
    "needs_token_rank",
    "objective_of",
    "title_of",
    "unpaired_of",
]
