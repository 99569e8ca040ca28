"""Selectors: scores to a weight per token."""

from tokenward.selection.base import ScoredTokens, Selector
from tokenward.selection.fraction import KeepAll, SideRule, Threshold, TopFraction

SELECTORS: dict[str, type] = {"top_fraction": TopFraction, "threshold": Threshold, "all": KeepAll}

__all__ = ["SELECTORS", "KeepAll", "ScoredTokens", "Selector", "SideRule", "Threshold", "TopFraction"]
