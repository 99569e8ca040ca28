"""Selectors: scores to a weight per token."""

from tokenward.config import Named
from tokenward.plugins import build, check_call
from tokenward.selection.base import ScoredTokens, Selector, is_signed, scope_of, unit_of
from tokenward.selection.fraction import KeepAll, SideRule, Threshold, TopFraction, stable_noise, uniform
from tokenward.selection.soft import SoftWeights
from tokenward.selection.transform import Transform

SELECTORS: dict[str, type] = {
    "top_fraction": TopFraction,
    "threshold": Threshold,
    "soft": SoftWeights,
    "transform": Transform,
    "all": KeepAll,
}


def selector_of(table: Named, seed: int) -> Selector:
    """The selector that a recipe's table names; its seed is the recipe's unless it has one."""
    arguments = dict(table.arguments)
    if table.name == "top_fraction":
        arguments.setdefault("seed", seed)
    selector = build("selector", table.name, arguments, SELECTORS)
    check_call("selector", table.name, selector, ("tokens",))
    return selector


__all__ = [
    "SELECTORS",
    "KeepAll",
    "ScoredTokens",
    "Selector",
    "SideRule",
    "SoftWeights",
    "Threshold",
    "TopFraction",
    "Transform",
    "is_signed",
    "scope_of",
    "selector_of",
    "stable_noise",
    "uniform",
    "unit_of",
]
