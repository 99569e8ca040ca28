"""Selectors: scores to a weight per token."""

from tokenward.selection.base import ScoredTokens, Selector, scope_of
from tokenward.selection.fraction import KeepAll, SideRule, Threshold, TopFraction
from tokenward.selection.soft import SoftWeights

SELECTORS: dict[str, type] = {
    "top_fraction": TopFraction,
    "threshold": Threshold,
    "soft": SoftWeights,
    "all": KeepAll,
}

__all__ = [
    "SELECTORS",
    "KeepAll",
    "ScoredTokens",
    "Selector",
    "SideRule",
    "SoftWeights",
    "Threshold",
    "TopFraction",
    "scope_of",
]
