"""From encoded comparisons to rows that are ready to train. The library's trainers and the stages of a run share it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from tokenward.api.constant import Say, warn_of_scores, warn_of_weights
from tokenward.errors import UserError
from tokenward.models.reward import RewardModel
from tokenward.objectives import Objective, needs_of, title_of
from tokenward.objectives.selected import Selected
from tokenward.plugins import name_of
from tokenward.scoring.basic import Scorer
from tokenward.scoring.join import with_read_values, with_scores
from tokenward.scoring.reads import is_online
from tokenward.scoring.store import TokenStore
from tokenward.selection import KeepAll, Selector, scope_of
from tokenward.selection.weights import selects_alone, weigh, weigh_step
from tokenward.tokens.segments import with_segments
from tokenward.tokens.table import TokenTable
from tokenward.training.passes import Prepare

WithReference = Callable[[TokenTable], TokenTable]
"""Adds the log-probabilities of the reference to a table, as its column ``reference_logp``."""


class Prepared(NamedTuple):
    """Rows that are ready to train.

    Attributes:
        objective: The training objective; with online selection, wrapped in the selection.
        rows: Training rows.
        eval: Eval rows. All their tokens have weight 1, so that scores do not influence the evaluation.
        prepare: Computes the weights of an optimizer step, for selectors that compare all rows of a step.
        dropped: Number of rows left out because no token of them was selected.
        online: Whether tokens are selected from the policy's own values during training.
    """

    objective: Objective
    rows: TokenTable
    eval: TokenTable
    prepare: Prepare | None = None
    dropped: int = 0
    online: bool = False


def prepare_rows(
    train: TokenTable,
    evaluation: TokenTable,
    *,
    objective: Objective,
    with_reference: WithReference,
    say: Say,
    selector: Selector | None = None,
    scorer: Scorer | None = None,
    store: TokenStore | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Prepared:
    """Add scores, weights and reference values to rows (SePO, arXiv 2408.13518, sections 3.2 and 3.3).

    Args:
        train: Training rows. A column ``weights`` is used as it is if there is no scorer.
        evaluation: Eval rows; may be empty.
        objective: The training objective.
        with_reference: Called if the objective needs reference values.
        say: Shows a line.
        selector: From scores to weights; None gives every token weight 1.
        scorer: From stored values to scores; None if there are no scores.
        store: The stored values.
        tokenizer: Of the rows, for selectors that pool over words or sentences.

    Raises:
        UserError: no row can be used for training, or no token is selected.
    """
    rows, held = (trained_on(objective, part, say) for part in (train, evaluation))
    online = False
    if scorer is not None and store is not None:
        online = is_online(scorer)
        rows, held, objective = _with_scores(rows, held, objective, selector, scorer, store)
    if needs_of(objective).reference:
        rows, held = (with_reference(part) if len(part) else part for part in (rows, held))
    step, dropped = None, 0
    if selector is not None and "scores" in rows.columns:
        if scope_of(selector) == "batch":
            step = _weigh_step(selector)
            rows, dropped = _drop_unselectable(rows, selector)
        else:
            rows = weigh(rows, selector, tokenizer)
    _check_some_scored(rows, scorer, selector)
    if "weights" in rows.columns:
        rows, dropped = drop_unselected(rows, objective)
    if scorer is not None and "scores" in rows.columns:
        equal = warn_of_scores(scorer, [np.asarray(rows.columns["scores"].flat)], say)
        if selector is not None and "weights" in rows.columns and not equal:
            warn_of_weights(selector, rows, say)
    return Prepared(objective, rows, held, step, dropped, online)


def _check_some_scored(rows: TokenTable, scorer: Scorer | None, selector: Selector | None) -> None:
    """Refuse scores that are all NaN, from which nothing can be selected."""
    if scorer is None or isinstance(selector, KeepAll) or "scores" not in rows.columns:
        return
    if np.isnan(np.asarray(rows.columns["scores"].flat)).all():
        raise UserError(
            f"every score is NaN, so no token has a score. Check what the scorer {name_of(scorer)} returns.",
            code="no-scores",
        )


def _weigh_step(selector: Selector) -> Prepare:
    return lambda rows, step: weigh_step(selector, rows)


def _drop_unselectable(rows: TokenTable, selector: Selector) -> tuple[TokenTable, int]:
    """Drop the rows with a response of which nothing could be selected in any step; returns the rest and the count."""
    kept = np.fromiter((selects_alone(selector, row) for row in rows), bool, len(rows))
    if not kept.any():
        raise _nothing_selected()
    return rows.where(kept), int((~kept).sum())


def _nothing_selected() -> UserError:
    return UserError(
        "the selector selects no token of any row, so there is nothing to train on. Raise its fractions, or lower its "
        "threshold.",
        code="nothing-selected",
        key="policy.selection",
    )


def _with_scores(
    rows: TokenTable,
    held: TokenTable,
    objective: Objective,
    selector: Selector | None,
    scorer: Scorer,
    store: TokenStore,
) -> tuple[TokenTable, TokenTable, Objective]:
    """Rows with the scores that the selection or the objective reads, or with the values that online scores are made of."""
    if is_online(scorer):
        rows, held = (with_read_values(part, scorer, store) if len(part) else part for part in (rows, held))
        return rows, held, objective if selector is None else Selected(objective, selector, scorer)
    if needs_of(objective).scores and len(held):
        held = with_scores(held, scorer, store)
    return with_scores(rows, scorer, store), held, objective


def trained_on(objective: Objective, rows: TokenTable, say: Say) -> TokenTable:
    """Rows without unpaired bad responses, if the objective learns from good ones only.

    Raises:
        UserError: no row is left.
    """
    bad = (rows.sizes == 1) & (rows.ranks[rows.starts[:-1]] > 0)
    if needs_of(objective).unpaired != "good" or not bad.any():
        return rows
    if bad.all():
        raise UserError(
            f"every row is a bad response without a good one, and {title_of(objective)} trains on good responses. Add good responses "
            "(label true), or use the objective kto, which learns from both.",
            code="no-usable-rows",
        )
    say(f"  {int(bad.sum())} rows left out: {title_of(objective)} does not learn from unpaired bad responses")
    return rows.where(~bad)


def drop_unselected(rows: TokenTable, objective: Objective) -> tuple[TokenTable, int]:
    """Drop weighted rows whose weights are all zero where the objective needs some; returns the rest and the count.

    A pairwise objective needs selected tokens in every response of a row, others in the best one, or in the only one.

    Raises:
        UserError: no row is left.
    """
    some = selected_counts(rows) > 0
    if not needs_of(objective).pairwise:
        sizes = rows.sizes
        some |= (rows.ranks > 0) & (np.repeat(sizes, sizes) > 1)
    kept = np.minimum.reduceat(some, rows.starts[:-1])
    if not kept.any():
        raise _nothing_selected()
    return rows.where(kept), int((~kept).sum())


def selected_counts(rows: TokenTable) -> np.ndarray:
    """Number of tokens of each response that have weight.  -> [r]"""
    flat, starts = rows.columns["weights"]
    sizes = rows.lengths
    # A generator: lists of numbers would take a hundred bytes a pair.
    counts = (np.count_nonzero(flat[first : first + size]) for first, size in zip(starts, sizes, strict=True))
    return np.fromiter(counts, np.int64, len(sizes))


def kept_shares(rows: TokenTable) -> dict[str, float]:
    """Share of the tokens that have weight, for chosen and rejected responses; empty without a column ``weights``."""
    if "weights" not in rows.columns:
        return {}
    counts, sizes = selected_counts(rows), rows.lengths
    worse = rows.ranks > 0
    sides = {"chosen": ~worse, "rejected": worse}
    return {name: float(counts[side].sum() / sizes[side].sum()) for name, side in sides.items() if side.any()}


def kept_line(ready: Prepared) -> str:
    """One line about the rows that are trained on."""
    rows = ready.rows
    unpaired = int((rows.sizes == 1).sum())
    parts = {"pairs": len(rows) - unpaired, "unpaired responses": unpaired}
    line = "  " + ", ".join(f"{count} {name}" for name, count in parts.items() if count)
    if ready.online or ready.prepare is not None:
        line += "; tokens are selected during training"
    else:
        shares = ", ".join(f"{side} {share:.1%}" for side, share in kept_shares(rows).items())
        line += f"; kept tokens: {shares}" if shares else "; every token is trained"
    return line + (f"; {ready.dropped} rows dropped: no token selected" if ready.dropped else "")


def reward_rows(model: RewardModel, rows: TokenTable) -> TokenTable:
    """Rows with the segments that a reward model pools over.

    Raises:
        UserError: the segments are spans and a row has none.
    """
    unit = model.settings.unit
    if unit == "token":
        return rows
    if unit == "spans":
        for number in range(len(rows)):
            if (comparison := rows.comparison(number)).spans is None:
                raise UserError(
                    f'{comparison.source}: the reward has unit "spans", and this row has no spans. Add a column spans to the data, or '
                    'use unit "sentence", "word" or "token".',
                    code="missing-spans",
                    key="reward.head.unit",
                )
    return replace(rows, change=partial(with_segments, unit, model.tokenizer))
