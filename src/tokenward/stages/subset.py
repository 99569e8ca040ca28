"""Subsets of comparisons that a scorer selects for an auxiliary model, as in TOSS-Pro (arXiv 2603.01185)."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from tokenward.artifacts import StageFolder, read_jsonl, write_jsonl
from tokenward.config import AuxiliaryModelTable, SubsetTable
from tokenward.distributed import first_alone
from tokenward.errors import UserError
from tokenward.objectives import needs_of, objective_of
from tokenward.ops.selection import best_places, kept_count, pooled_scores
from tokenward.scoring.join import with_scores
from tokenward.scoring.reads import is_online
from tokenward.stages.auxiliary import made_scorer, subset_models
from tokenward.stages.base import Checks
from tokenward.stages.part_checks import check_scorer
from tokenward.stages.run import Run
from tokenward.stages.scores import value_inputs, value_settings, write_values
from tokenward.stages.tables import tables
from tokenward.tokens.table import CHUNK_ROWS, TokenTable

SUBSET = "subset.jsonl"
"""File of the subset in the auxiliary model's folder: a line per comparison, highest score first."""

VALUES = "subset"
"""Folder of the scorer's values in the auxiliary model's; deleted when the auxiliary model is trained."""


def subset_settings(run: Run, table: AuxiliaryModelTable) -> dict[str, Any]:
    """Every part of the recipe that decides a subset, except the auxiliary model's table."""
    if table.subset is None:
        return {}
    found = value_settings(run, made_scorer(table.subset.scorer))
    return {f"subset.{key}": value for key, value in found.items()}


def subset_inputs(run: Run, table: AuxiliaryModelTable) -> dict[str, str]:
    """Fingerprints of the models and files that a subset is made from."""
    return {} if table.subset is None else value_inputs(run, made_scorer(table.subset.scorer))


def subset_pairs(run: Run, stage: StageFolder, subset: SubsetTable) -> TokenTable:
    """The subset as pairs, the better response first; read from the stage's folder, or selected and written there.

    A line of ``subset.jsonl`` has the ``rank`` from 1, the ``score``, the ``source``, the ``row`` in the data stage's
    ``train.jsonl`` from 0, and there the indices of the better and the worse of its ``responses``.

    Raises:
        UserError: no comparison has a score.
    """
    train = tables(run, run.tokenizer_template(run.reference_model)).part("train")
    stage.temporary.append(stage.path / VALUES)
    file = stage.path / SUBSET
    if not first_alone(file.is_file):
        pairs, numbers, scores = _selected(run, stage, subset, train)
        first_alone(lambda: write_jsonl(file, _records(pairs, numbers, scores)))
    found = read_jsonl(file)
    places = np.array([line["responses"] for line in found], np.int64).reshape(-1, 2)
    firsts = train.store.starts[np.array([line["row"] for line in found], np.int64)]
    responses = (firsts[:, None] + places).reshape(-1)
    return replace(TokenTable.of_pairs(train.store, responses, np.full(len(found), 2)), scratch=train.scratch)


def _selected(
    run: Run, stage: StageFolder, subset: SubsetTable, pairs: TokenTable
) -> tuple[TokenTable, np.ndarray, np.ndarray]:
    """The training pairs, the indices of the selected ones, and their scores, highest first."""
    template = run.tokenizer_template(run.reference_model)
    looked, scorer = looked_at(pairs, subset), made_scorer(subset.scorer, run.recipe.seed)
    store = write_values(run, stage, stage.path / VALUES, scorer, template, looked.by_prompt())
    scores = _comparison_scores(with_scores(looked, scorer, store), subset)
    best = best_places(scores, subset_count(subset, scores))
    if not len(best):
        raise UserError(
            f"the scorer {subset.scorer.name} gives no training comparison a score, so the subset is empty. Use a scorer that scores "
            "tokens of the training data.",
            code="no-scores",
        )
    found = scores[best].numpy()
    run.display.line(
        f"  {len(best)} of {len(pairs)} comparisons selected by {subset.scorer.name}, scores {found[0]:.3g} to {found[-1]:.3g}"
    )
    return pairs, best.numpy(), found


def looked_at(pairs: TokenTable, subset: SubsetTable) -> TokenTable:
    """The responses whose tokens are scored."""
    return pairs if subset.side == "both" else pairs.of_place(("chosen", "rejected").index(subset.side))


def subset_count(subset: SubsetTable, scores: torch.Tensor) -> int:
    """Maximum size of the subset, at least 1; a fraction counts the comparisons that have a score.  [comparisons]"""
    if subset.count is not None:
        return subset.count
    assert subset.fraction is not None
    scored = (~scores.isnan()).sum()[None]
    return int(kept_count(scored, subset.fraction, rule="floor", minimum=1))


def _comparison_scores(rows: TokenTable, subset: SubsetTable) -> torch.Tensor:
    """One number per row, reduced from its token scores; NaN for rows without scores.  -> [rows] float64"""
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
    """Whether an auxiliary model trains on its subset with swapped responses.

    The side whose tokens were scored comes first, because the comparison was selected for them.
    """
    assert table.subset is not None
    return table.swap_labels if table.subset.side == "both" else table.subset.side == "rejected"


def first_is_worse(table: AuxiliaryModelTable) -> bool:
    """Whether an auxiliary model's own pairs and its eval pairs are swapped."""
    alone = table.subset is not None and table.subset.alone
    return turned(table) if alone else table.swap_labels


def with_subset(own: TokenTable | None, picked: TokenTable, *, pairwise: bool) -> TokenTable:
    """Own rows followed by the rows of the subset that are not among them; no row occurs twice.

    Args:
        own: The auxiliary model's own rows; None if it trains on its subset only.
        picked: The subset, in training order.
        pairwise: Whether a row is identified by both responses, or by the first only.
    """
    names = _identities(picked, pairwise)
    new = np.sort(np.unique(names, return_index=True)[1])
    if own is None:
        return picked.choose(new)
    new = new[~np.isin(names[new], _identities(own, pairwise))]
    return own.then(picked.choose(new))


def with_longest(own: TokenTable, train: TokenTable, subset: SubsetTable) -> TokenTable:
    """An auxiliary model's own rows and, in place of its subset, the longest pairs; for a plan."""
    lengths = np.add.reduceat(train.lengths, train.starts[:-1]) + train.of_rows("prompt_kept")
    count = subset_count(subset, torch.from_numpy(lengths.astype(float)))
    picked = train.choose(np.argsort(-lengths, kind="stable")[:count])
    return picked if subset.alone else own.then(picked)


def _identities(rows: TokenTable, pairwise: bool) -> np.ndarray:
    """A number that identifies what is trained of each row.  -> [rows] uint64"""
    first = rows.reply_names(0)
    return first * np.uint64(3) + rows.reply_names(1) if pairwise else first


def check_subset(run: Run) -> Checks:
    """Checks of the auxiliary models' subsets, by key."""
    subsets = {
        name: (table, table.subset)
        for name, table in run.recipe.auxiliary_models.items()
        if table.subset is not None
    }
    scorers = {
        f"auxiliary_models.{name}.subset.scorer": partial(_check_scorer, run, name, subset)
        for name, (_, subset) in subsets.items()
    }
    # After all scorers, because the order of training depends on every one of them.
    tables = {
        f"auxiliary_models.{name}.subset": partial(_check_table, run, name, table, subset)
        for name, (table, subset) in subsets.items()
    }
    return {**scorers, **tables}


def _check_scorer(run: Run, name: str, subset: SubsetTable) -> None:
    scorer = made_scorer(subset.scorer)
    if is_online(scorer):
        raise UserError(
            f"the subset of the auxiliary model {name} reads the policy, which is trained later. Use a scorer of frozen models: the "
            "reference, the oracle, the reward or another auxiliary model.",
            code="reads-policy",
        )
    check_scorer(run, scorer)


def _check_table(run: Run, name: str, table: AuxiliaryModelTable, subset: SubsetTable) -> None:
    who = f"the subset of the auxiliary model {name}"
    if (subset.fraction is None) == (subset.count is None):
        got = "both fraction and count" if subset.count is not None else "neither fraction nor count"
        raise UserError(
            f"{who} has {got}. Write either fraction: 0.05, a fraction of the training comparisons, or count: 100.",
            code="conflicting-keys",
        )
    way = _way_back(run, [name])
    if len(way) == 2:
        raise UserError(
            f"{who} reads {name} itself, which is trained on the subset. For a second round, add another auxiliary model whose subset "
            "reads this one.",
            code="circular-subset",
        )
    if way:
        raise UserError(
            f"{who} depends on itself: {' reads '.join(way)}. Let the subset of one of them read other models.",
            code="circular-subset",
        )
    if subset.alone:
        _check_alone(name, table, subset)
    else:
        _check_added(name, table, subset)


def _way_back(run: Run, path: list[str]) -> list[str]:
    """The auxiliary models through whose subsets the first of a path reads itself, from it to it; empty if it does not."""
    for model in subset_models(run, path[-1]):
        if model == path[0]:
            return [*path, model]
        found = [] if model in path else _way_back(run, [*path, model])
        if found:
            return found
    return []


def _check_alone(name: str, table: AuxiliaryModelTable, subset: SubsetTable) -> None:
    unused = ["fraction"] if "fraction" in table.model_fields_set else []
    unused += ["swap_labels"] if "swap_labels" in table.model_fields_set and subset.side != "both" else []
    if unused:
        keys = " and ".join(unused)
        raise UserError(
            f"the auxiliary model {name} has {keys}, without effect: with alone: true it trains only on its subset, in the order that "
            f"side gives. Remove {keys}, or alone.",
            code="unused-key",
        )


def _check_added(name: str, table: AuxiliaryModelTable, subset: SubsetTable) -> None:
    """Check that a subset adds something to the auxiliary model's own pairs, and does not contradict them."""
    same_order = turned(table) == table.swap_labels
    if same_order and table.fraction == 1:
        raise UserError(
            f"the auxiliary model {name} trains on all pairs (fraction is 1), so a subset of side {subset.side} adds none. Write alone: "
            "true, a smaller fraction, or another side.",
            code="empty-subset",
        )
    if not same_order and needs_of(objective_of("objective", table.objective)).pairwise:
        better = "rejected" if table.swap_labels else "chosen"
        raise UserError(
            f"the auxiliary model {name} learns by {table.objective.name} to prefer the {better} response, and by its subset of side "
            f"{subset.side} to prefer the {subset.side} one, so pairs in both would contradict. Write alone: true, another side, or an "
            "objective of single responses such as {name: sft}.",
            code="contradicting-subset",
        )
