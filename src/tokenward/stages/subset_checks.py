"""Whether the subset of auxiliary models can be made, and made before the auxiliary models train: asked before anything is computed."""

from collections.abc import Callable
from functools import partial
from typing import Any

from tokenward.config import AuxiliaryModelTable, SubsetTable
from tokenward.errors import UserError
from tokenward.objectives import needs_of, objective_of
from tokenward.scoring.reads import is_online
from tokenward.stages.auxiliary import picking_models
from tokenward.stages.part_checks import check_scorer
from tokenward.stages.run import Run
from tokenward.stages.scorers import made_scorer
from tokenward.stages.subset import turned


def check_subset(run: Run) -> dict[str, Callable[[], Any]]:
    """Checks of the auxiliary models' subset, by the key that each is about."""
    checks: dict[str, Callable[[], Any]] = {}
    picking = {name: table for name, table in run.recipe.auxiliary_models.items() if table.subset is not None}
    for name, table in picking.items():
        assert table.subset is not None
        checks[f"auxiliary_models.{name}.subset.scorer"] = partial(_check_scorer, run, name, table.subset)
    # Whose picks wait for each other is asked when every scorer alone is known to be one.
    for name, table in picking.items():
        assert table.subset is not None
        checks[f"auxiliary_models.{name}.subset"] = partial(_check_table, run, name, table, table.subset)
    return checks


def _check_scorer(run: Run, name: str, subset: SubsetTable) -> None:
    scorer = made_scorer(subset.scorer)
    if is_online(scorer):
        raise UserError(
            f"the subset of the auxiliary model {name} read the policy, which trains after every auxiliary model. Write a scorer that reads frozen "
            "models: the reference, the oracle, the reward or another auxiliary model."
        )
    check_scorer(run, scorer)


def _check_table(run: Run, name: str, table: AuxiliaryModelTable, subset: SubsetTable) -> None:
    _check_count(name, subset)
    _check_order(run, name)
    if subset.alone:
        _check_alone(name, table, subset)
    else:
        _check_added(name, table, subset)


def _check_count(name: str, subset: SubsetTable) -> None:
    if (subset.fraction is None) == (subset.count is None):
        got = "both fraction and count" if subset.count is not None else "neither fraction nor count"
        raise UserError(
            f"the subset of the auxiliary model {name} have {got}, and one of them says how many comparisons are picked. Write "
            "fraction: 0.05 for a share of the training comparisons, or count: 100."
        )


def _check_order(run: Run, name: str) -> None:
    """Refuse subset that wait for the auxiliary model which they train."""
    way = _way_back(run, [name])
    if len(way) == 2:
        raise UserError(
            f"the subset of the auxiliary model {name} read {name} itself, which is trained on them. Let them read another auxiliary model: a "
            "further round is a further auxiliary model, whose subset read the one before."
        )
    if way:
        raise UserError(
            f"the subset of the auxiliary model {name} wait for it: {' reads '.join(way)}. None of these auxiliary models can be trained first. "
            f"Let the subset of one of them read models that are there without it."
        )


def _way_back(run: Run, path: list[str]) -> list[str]:
    """Auxiliary models through whose picks the first of a path reads itself, from it to it; empty where it does not."""
    for model in picking_models(run, path[-1]):
        if model == path[0]:
            return [*path, model]
        found = [] if model in path else _way_back(run, [*path, model])
        if found:
            return found
    return []


def _check_alone(name: str, table: AuxiliaryModelTable, subset: SubsetTable) -> None:
    idle = ["fraction"] if "fraction" in table.model_fields_set else []
    idle += ["swap_labels"] if "swap_labels" in table.model_fields_set and subset.side != "both" else []
    if idle:
        raise UserError(
            f"the auxiliary model {name} has {' and '.join(idle)}, and its picks have alone: true, so that it trains on them alone and "
            f"on them in the order that subset.side says. Leave {' and '.join(idle)} out, or alone."
        )


def _check_added(name: str, table: AuxiliaryModelTable, subset: SubsetTable) -> None:
    """Refuse subset that add nothing to an auxiliary model's own part of the pairs, or that contradict it."""
    same = turned(table) == table.swap_labels
    if same and table.fraction == 1:
        raise UserError(
            f"the auxiliary model {name} trains on all pairs (fraction is 1), so that subset of side {subset.side}, trained in the same order, add "
            "none. Write alone: true, a smaller fraction of the auxiliary model, or the other side."
        )
    if not same and needs_of(objective_of("objective", table.objective)).pairwise:
        raise UserError(
            f"the auxiliary model {name} learns by {table.objective.name} to prefer the {_better(table.swap_labels)} response, and its subset, "
            f"of side {subset.side}, the {subset.side} one: a pair that is in both would be taught both ways. Write alone: true, another "
            "side, or an objective of single responses such as {name: sft}."
        )


def _better(swap_labels: bool) -> str:
    return "rejected" if swap_labels else "chosen"
