"""Subsets of comparisons that a scorer chooses for an auxiliary model, as in TOSS-Pro (arXiv 2603.01185)."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from tokenward.artifacts import StageFolder, read_jsonl, write_jsonl
from tokenward.config import AuxiliaryModelTable, SubsetTable
from tokenward.errors import UserError
from tokenward.objectives import needs_of, objective_of
from tokenward.ops.selection import best_places, kept_count, pooled_scores
from tokenward.scoring.join import scored
from tokenward.scoring.reads import is_online
from tokenward.stages.auxiliary import made_scorer, picking_models
from tokenward.stages.part_checks import check_scorer
from tokenward.stages.run import Run
from tokenward.stages.scores import value_inputs, value_settings, write_values
from tokenward.stages.tables import tables
from tokenward.tokens.table import CHUNK_ROWS, TokenTable

SUBSET = "subset.jsonl"
"""File of the picked comparisons in the auxiliary model's folder, a line each, the highest score first."""

VALUES = "subset"
"""Folder in the auxiliary model's for what the scorer reads; it goes when the auxiliary model is trained."""


def subset_settings(run: Run, table: AuxiliaryModelTable) -> dict[str, Any]:
    """What of the recipe decides an auxiliary model's picks beside its own table."""
    if table.subset is None:
        return {}
    found = value_settings(run, made_scorer(table.subset.scorer))
    return {f"subset.{key}": value for key, value in found.items()}


def subset_inputs(run: Run, table: AuxiliaryModelTable) -> dict[str, str]:
    """Fingerprints of the models and files that an auxiliary model's picks are made from."""
    return {} if table.subset is None else value_inputs(run, made_scorer(table.subset.scorer))


def picked_pairs(run: Run, stage: StageFolder, subset: SubsetTable) -> TokenTable:
    """The picked comparisons as pairs, the better response first; made and written unless the stage has them already.

    A line of ``subset.jsonl`` has the ``rank`` from 1, the ``score``, the ``source``, the ``row`` of the data stage's
    ``train.jsonl``, counted from 0, and the places there of the better and the worse of its ``responses``.

    Raises:
        UserError: no comparison has a score.
    """
    train = tables(run, run.tokenizer_template(run.reference_model)).part("train")
    stage.temporary.append(stage.path / VALUES)
    file = stage.path / SUBSET
    if not file.is_file():
        write_jsonl(file, _records(*_picked(run, stage, subset, train)))
    found = read_jsonl(file)
    places = np.array([line["responses"] for line in found], np.int64).reshape(-1, 2)
    firsts = train.store.starts[np.array([line["row"] for line in found], np.int64)]
    responses = (firsts[:, None] + places).reshape(-1)
    return replace(TokenTable.of_pairs(train.store, responses, np.full(len(found), 2)), scratch=train.scratch)


def _picked(
    run: Run, stage: StageFolder, subset: SubsetTable, pairs: TokenTable
) -> tuple[TokenTable, np.ndarray, np.ndarray]:
    """The training pairs, the numbers of those that are picked, and the scores of these, the highest first."""
    template = run.tokenizer_template(run.reference_model)
    looked, scorer = looked_at(pairs, subset), made_scorer(subset.scorer, run.recipe.seed)
    store = write_values(run, stage, stage.path / VALUES, scorer, template, looked.by_prompt())
    scores = comparison_scores(scored(looked, scorer, store), subset)
    best = best_places(scores, picked_count(subset, scores))
    if not len(best):
        raise UserError(
            f"no comparison has a score by {subset.scorer.name}, so that none can be picked. Name a scorer that gives "
            "tokens of the training data one."
        )
    found = scores[best].numpy()
    run.display.line(
        f"  {len(best)} of {len(pairs)} comparisons picked by {subset.scorer.name}, scores {found[0]:.3g} to {found[-1]:.3g}"
    )
    return pairs, best.numpy(), found


def looked_at(pairs: TokenTable, subset: SubsetTable) -> TokenTable:
    """The responses of each pair whose tokens are scored."""
    return pairs if subset.side == "both" else pairs.of_place(("chosen", "rejected").index(subset.side))


def picked_count(subset: SubsetTable, scores: torch.Tensor) -> int:
    """How many comparisons are picked at most, one at least; a fraction is that of those which have a score.  [c]"""
    if subset.count is not None:
        return subset.count
    assert subset.fraction is not None
    scored = (~scores.isnan()).sum()[None]
    return int(kept_count(scored, subset.fraction, rule="floor", minimum=1))


def comparison_scores(rows: TokenTable, subset: SubsetTable) -> torch.Tensor:
    """One number of each row, from the scores of its tokens; NaN where none has one.  -> [rows] float64"""
    column = rows.columns["scores"]
    found = torch.empty(len(rows), dtype=torch.float64)
    for first in range(0, len(rows), CHUNK_ROWS):
        last = min(first + CHUNK_ROWS, len(rows))
        mine = slice(int(rows.starts[first]), int(rows.starts[last]))
        lengths = rows.lengths[mine]
        sizes = torch.from_numpy(np.add.reduceat(lengths, rows.starts[first:last] - mine.start))
        owner = torch.repeat_interleave(torch.arange(last - first), sizes)
        scores = column.gathered(lengths, mine.start).double()
        found[first:last] = pooled_scores(scores, owner, last - first, how=subset.pair_score)
    return found


def _records(pairs: TokenTable, numbers: np.ndarray, scores: np.ndarray) -> Iterator[dict[str, Any]]:
    chosen = pairs.choose(numbers)
    rows = chosen.first_rows
    places = (chosen.responses.reshape(-1, 2) - pairs.store.starts[rows][:, None]).tolist()
    comparisons = map(chosen.comparison, range(len(chosen)))
    items = zip(rows.tolist(), places, scores.tolist(), comparisons, strict=True)
    return (
        {"rank": rank, "score": score, "source": comparison.source, "row": row, "responses": pair}
        for rank, (row, pair, score, comparison) in enumerate(items, 1)
    )


def turned(table: AuxiliaryModelTable) -> bool:
    """Whether an auxiliary model trains on its picks with the worse response in the place of the better one.

    The side whose tokens were looked at stands first: it is for these that the comparison was picked.
    """
    assert table.subset is not None
    return table.swap_labels if table.subset.side == "both" else table.subset.side == "rejected"


def first_is_worse(table: AuxiliaryModelTable) -> bool:
    """Whether an auxiliary model's own part of the pairs, and those that it is judged by, are swapped."""
    alone = table.subset is not None and table.subset.alone
    return turned(table) if alone else table.swap_labels


def with_picked(own: TokenTable | None, picked: TokenTable, *, pairwise: bool) -> TokenTable:
    """Rows, and after them the picked ones that they lack; nothing is there twice.

    Args:
        own: What the auxiliary model trains on anyway; None where it trains on its subset alone.
        picked: As they are to be trained.
        pairwise: Whether a row is a pair of responses, or its first response alone.
    """
    names = _names(picked, pairwise)
    new = np.sort(np.unique(names, return_index=True)[1])
    if own is None:
        return picked.choose(new)
    new = new[~np.isin(names[new], _names(own, pairwise))]
    return own.then(picked.choose(new))


def with_longest(own: TokenTable, train: TokenTable, subset: SubsetTable) -> TokenTable:
    """An auxiliary model's part of the pairs, and the longest pairs in place of those that it will pick, for a plan."""
    lengths = np.add.reduceat(train.lengths, train.starts[:-1]) + train.of_rows("prompt_kept")
    count = picked_count(subset, torch.from_numpy(lengths.astype(float)))
    picked = train.choose(np.argsort(-lengths, kind="stable")[:count])
    return picked if subset.alone else own.then(picked)


def _names(rows: TokenTable, pairwise: bool) -> np.ndarray:
    """A number that names what is trained of each row.  -> [rows] uint64"""
    first = rows.reply_names(0)
    return first * np.uint64(3) + rows.reply_names(1) if pairwise else first


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
