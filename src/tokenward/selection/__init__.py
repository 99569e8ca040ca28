"""Selectors: from scores to a weight per token."""

from tokenward.config import Named
from tokenward.plugins import build, check_call
from tokenward.selection.base import ScoredTokens, Selector, is_signed, scope_of, unit_of
from tokenward.selection.selectors import (
    KeepAll,
    SideRule,
    SoftWeights,
    Threshold,
    TopFraction,
    Transform,
    stable_noise,
    uniform,
)

SELECTORS: dict[str, type] = {
    "top_fraction": TopFraction,
    "threshold": Threshold,
    "soft": SoftWeights,
    "transform": Transform,
    "all": KeepAll,
}


def selector_of(table: Named, seed: int) -> Selector:
    """Build the selector of a recipe's table; ``seed`` is used unless the table has one."""
    arguments = dict(table.arguments)
    if table.name == "top_fraction":
        arguments.setdefault("seed", seed)
    selector = build("selector", table.name, arguments, SELECTORS)
    check_call("selector", table.name, selector, ("tokens",))
    return selector


__all__ = [
    "SELECTORS", "KeepAll", "ScoredTokens", "Selector", "SideRule", "SoftWeights", "Threshold", "TopFraction",
    "Transform", "is_signed", "scope_of", "selector_of", "stable_noise", "uniform", "unit_of",
]  # fmt: skip
