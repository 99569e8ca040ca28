"""Comparisons that a scorer picks for an auxiliary model to train on, as TOSS-Pro does (arXiv 2603.01185)."""

import json
from typing import Any

import numpy as np
import torch

from tokenward.artifacts import StageFolder, atomic_write
from tokenward.config import AuxiliaryModelTable, SubsetTable
from tokenward.data.choice import Choice
from tokenward.errors import UserError
from tokenward.ops.selection import best_places, kept_count, pooled_scores
from tokenward.pipeline.context import Run
from tokenward.pipeline.data import encoded_choice, pair_sets
from tokenward.pipeline.rows import LazyRows
from tokenward.pipeline.score_stages import value_inputs, value_settings, write_values
from tokenward.pipeline.scored import rows_scored_by
from tokenward.pipeline.train_stages import reply_names
from tokenward.pipeline.values import CHUNK_ROWS, gathered, made_scorer
from tokenward.tokens.encoded import EncodedRows, Joined

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


def picked_pairs(run: Run, stage: StageFolder, subset: SubsetTable) -> Choice:
    """The picked comparisons as pairs, the better response first; made and written unless the stage has them already.

    A line of ``subset.jsonl`` has the ``rank`` from 1, the ``score``, the ``source``, the ``row`` of the data stage's
    ``train.jsonl``, counted from 0, and the places there of the better and the worse of its ``responses``.

    Raises:
        UserError: no comparison has a score.
    """
    train = pair_sets(run).train
    stage.temporary.append(stage.path / VALUES)
    file = stage.path / SUBSET
    if not file.is_file():
        atomic_write(file, _lines(*_picked(run, stage, subset, train)))
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    places = [place for line in found for place in line["responses"]]
    return Choice.pairs(train.file, [line["row"] for line in found], places)


def _picked(
    run: Run, stage: StageFolder, subset: SubsetTable, train: Choice
) -> tuple[EncodedRows, np.ndarray, np.ndarray]:
    """The training pairs, the numbers of those that are picked, and the scores of these, the highest first."""
    template = run.tokenizer_template(run.reference_model)
    pairs = encoded_choice(run, train, template)[0]
    looked, scorer = looked_at(pairs, subset), made_scorer(subset.scorer, run.recipe.seed)
    store = write_values(run, stage, stage.path / VALUES, scorer, template, Joined([looked.by_prompt()]))
    scored = rows_scored_by(run, scorer, store, LazyRows(encoded=looked))
    scores = comparison_scores(scored, subset)
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


def looked_at(pairs: EncodedRows, subset: SubsetTable) -> EncodedRows:
    """The responses of each pair whose tokens are scored."""
    return pairs if subset.side == "both" else pairs.of_place(("chosen", "rejected").index(subset.side))


def picked_count(subset: SubsetTable, scores: torch.Tensor) -> int:
    """How many comparisons are picked at most, one at least; a fraction is that of those which have a score.  [c]"""
    if subset.count is not None:
        return subset.count
    assert subset.fraction is not None
    scored = (~scores.isnan()).sum()[None]
    return int(kept_count(scored, subset.fraction, rule="floor", minimum=1))


def comparison_scores(rows: LazyRows, subset: SubsetTable) -> torch.Tensor:
    """One number of each row, from the scores of its tokens; NaN where none has one.  -> [rows] float64"""
    flat, starts = rows.columns["scores"]
    known, found = rows.responses, torch.empty(len(rows), dtype=torch.float64)
    for first in range(0, len(rows), CHUNK_ROWS):
        last = min(first + CHUNK_ROWS, len(rows))
        group = known.of_rows(first, last)
        mine = starts[int(known.starts[first]) : int(known.starts[last])]
        sizes = torch.from_numpy(np.add.reduceat(group.lengths, group.starts[:-1]))
        owner = torch.repeat_interleave(torch.arange(last - first), sizes)
        scores = gathered(flat, mine, group.lengths).double()
        found[first:last] = pooled_scores(scores, owner, last - first, how=subset.pair_score)
    return found


def _lines(pairs: EncodedRows, numbers: np.ndarray, scores: np.ndarray) -> str:
    chosen = pairs.comparisons.choose(numbers)
    places = chosen.places.reshape(-1, 2).tolist()
    items = zip(chosen.first_rows().tolist(), places, scores.tolist(), chosen, strict=True)
    lines = (
        {"rank": rank, "score": score, "source": comparison.source, "row": row, "responses": pair}
        for rank, (row, pair, score, comparison) in enumerate(items, 1)
    )
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


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


def with_picked(own: LazyRows | None, picked: LazyRows, *, pairwise: bool) -> LazyRows:
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
    assert isinstance(own.encoded, EncodedRows)
    assert isinstance(picked.encoded, EncodedRows)
    new = new[~np.isin(names[new], _names(own, pairwise))]
    return LazyRows(encoded=own.encoded.then(picked.encoded.choose(new)))


def _names(rows: LazyRows, pairwise: bool) -> np.ndarray:
    """A number that names what is trained of each row.  -> [rows] uint64"""
    first = reply_names(rows, 0)
    return first * np.uint64(3) + reply_names(rows, 1) if pairwise else first
