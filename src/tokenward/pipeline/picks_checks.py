"""Whether the picks of experts can be made, and made before the experts train: asked before anything is computed."""

from collections.abc import Callable
from functools import partial
from typing import Any

from tokenward.config import ExpertTable, PicksTable
from tokenward.errors import UserError
from tokenward.objectives import is_pairwise, objective_of
from tokenward.pipeline.context import Run
from tokenward.pipeline.experts import picking_models
from tokenward.pipeline.part_checks import check_scorer
from tokenward.pipeline.picks import turned
from tokenward.pipeline.values import made_scorer
from tokenward.scoring.reads import is_online


def check_picks(run: Run) -> dict[str, Callable[[], Any]]:
    """Checks of the experts' picks, by the key that each is about."""
    checks: dict[str, Callable[[], Any]] = {}
    picking = {name: table for name, table in run.recipe.experts.items() if table.picks is not None}
    for name, table in picking.items():
        assert table.picks is not None
        checks[f"experts.{name}.picks.scorer"] = partial(_check_scorer, run, name, table.picks)
    # Whose picks wait for each other is asked when every scorer alone is known to be one.
    for name, table in picking.items():
        assert table.picks is not None
        checks[f"experts.{name}.picks"] = partial(_check_table, run, name, table, table.picks)
    return checks


def _check_scorer(run: Run, name: str, picks: PicksTable) -> None:
    scorer = made_scorer(picks.scorer)
    if is_online(scorer):
        raise UserError(
            f"the picks of the expert {name} read the policy, which trains after every expert. Write a scorer that reads frozen "
            "models: the reference, the oracle, the reward or another expert."
        )
    check_scorer(run, scorer)


def _check_table(run: Run, name: str, table: ExpertTable, picks: PicksTable) -> None:
    _check_count(name, picks)
    _check_order(run, name)
    if picks.alone:
        _check_alone(name, table, picks)
    else:
        _check_added(name, table, picks)


def _check_count(name: str, picks: PicksTable) -> None:
    if (picks.fraction is None) == (picks.count is None):
        got = "both fraction and count" if picks.count is not None else "neither fraction nor count"
        raise UserError(
            f"the picks of the expert {name} have {got}, and one of them says how many comparisons are picked. Write "
            "fraction: 0.05 for a share of the training comparisons, or count: 100."
        )


def _check_order(run: Run, name: str) -> None:
    """Refuse picks that wait for the expert which they train."""
    way = _way_back(run, [name])
    if len(way) == 2:
        raise UserError(
            f"the picks of the expert {name} read {name} itself, which is trained on them. Let them read another expert: a "
            "further round is a further expert, whose picks read the one before."
        )
    if way:
        raise UserError(
            f"the picks of the expert {name} wait for it: {' reads '.join(way)}. None of these experts can be trained first. "
            f"Let the picks of one of them read models that are there without it."
        )


def _way_back(run: Run, path: list[str]) -> list[str]:
    """Experts through whose picks the first of a path reads itself, from it to it; empty where it does not."""
    for model in picking_models(run, path[-1]):
        if model == path[0]:
            return [*path, model]
        found = [] if model in path else _way_back(run, [*path, model])
        if found:
            return found
    return []


def _check_alone(name: str, table: ExpertTable, picks: PicksTable) -> None:
    idle = ["fraction"] if "fraction" in table.model_fields_set else []
    idle += ["swapped"] if "swapped" in table.model_fields_set and picks.side != "both" else []
    if idle:
        raise UserError(
            f"the expert {name} has {' and '.join(idle)}, and its picks have alone: true, so that it trains on them alone and "
            f"on them in the order that picks.side says. Leave {' and '.join(idle)} out, or alone."
        )


def _check_added(name: str, table: ExpertTable, picks: PicksTable) -> None:
    """Refuse picks that add nothing to an expert's own part of the pairs, or that contradict it."""
    same = turned(table) == table.swapped
    if same and table.fraction == 1:
        raise UserError(
            f"the expert {name} trains on all pairs (fraction is 1), so that picks of side {picks.side}, trained in the same order, add "
            "none. Write alone: true, a smaller fraction of the expert, or the other side."
        )
    if not same and is_pairwise(objective_of("objective", table.objective)):
        raise UserError(
            f"the expert {name} learns by {table.objective.name} to prefer the {_better(table.swapped)} response, and its picks, "
            f"of side {picks.side}, the {picks.side} one: a pair that is in both would be taught both ways. Write alone: true, another "
            "side, or an objective of single responses such as {name: sft}."
        )


def _better(swapped: bool) -> str:
    return "rejected" if swapped else "chosen"
