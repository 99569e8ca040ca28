"""Objectives: per-token log-probabilities and weights to one loss per comparison."""

from tokenward.objectives.base import Losses, Objective, is_pairwise, needs_entropy, needs_reference
from tokenward.objectives.checked import CheckedObjective
from tokenward.objectives.guidance import Reinforce
from tokenward.objectives.likelihood import SFT, WeightedLikelihood
from tokenward.objectives.listwise import PlackettLuce
from tokenward.objectives.pairwise import DPO, SePO, SimPO

OBJECTIVES: dict[str, type] = {
    "dpo": DPO,
    "sepo": SePO,
    "simpo": SimPO,
    "sft": SFT,
    "weighted_likelihood": WeightedLikelihood,
    "reinforce": Reinforce,
    "plackett_luce": PlackettLuce,
}

__all__ = [
    "DPO",
    "OBJECTIVES",
    "SFT",
    "CheckedObjective",
    "Losses",
    "Objective",
    "PlackettLuce",
    "Reinforce",
    "SePO",
    "SimPO",
    "WeightedLikelihood",
    "is_pairwise",
    "needs_entropy",
    "needs_reference",
]
