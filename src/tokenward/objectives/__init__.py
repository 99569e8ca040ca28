"""Objectives: per-token log-probabilities and weights to one loss per comparison."""

from tokenward.objectives.base import Losses, Objective
from tokenward.objectives.pairwise import DPO, SFT, SePO, SimPO

OBJECTIVES: dict[str, type] = {"dpo": DPO, "sepo": SePO, "simpo": SimPO, "sft": SFT}

__all__ = ["DPO", "OBJECTIVES", "SFT", "Losses", "Objective", "SePO", "SimPO"]
