"""From scored comparisons to rows that train: what the trainer of the library and the stages of a run share."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from tokenward.api.inputs import Say
from tokenward.errors import UserError
from tokenward.models.loading import LanguageModel
from tokenward.objectives import (
    Objective,
    needs_of,
    title_of,
)
from tokenward.objectives.selected import Selected
from tokenward.scoring.basic import Scorer
from tokenward.scoring.join import scored, with_read_values
from tokenward.scoring.reads import is_online
from tokenward.scoring.store import TokenStore
from tokenward.selection import Selector, scope_of
from tokenward.selection.weights import weigh, weigh_step
from tokenward.tokens.table import TokenTable
from tokenward.training.passes import Prepare

WithReference = Callable[[TokenTable], TokenTable]
"""Adds the log-probabilities of the reference to a table, as its column ``reference_logp``."""


class Prepared(NamedTuple):
    """Rows that are ready to train.

    Attributes:
        objective: What is trained with; around it the selection, if that is made online.
        rows: Training comparisons.
        eval: Comparisons to evaluate on. Every token of them has weight 1: scores must not choose what judges.
        prepare: Makes the weights of an optimizer step, if the selector chooses among all comparisons of one.
        dropped: Comparisons left out because nothing of them was selected.
        online: Whether tokens are selected by the policy's own numbers while it trains.
    """

    objective: Objective
    rows: TokenTable
    eval: TokenTable
    prepare: Prepare | None = None
    dropped: int = 0
    online: bool = False


def prepared(
    train: TokenTable,
    evaluation: TokenTable,
    *,
    objective: Objective,
    selector: Selector | None,
    scorer: Scorer | None,
    store: TokenStore | None,
    tokenizer: PreTrainedTokenizerBase,
    with_reference: WithReference,
    say: Say,
) -> Prepared:
    """Scores, weights and reference values for the rows of a policy (SePO, arXiv 2408.13518, sections 3.2 and 3.3).

    Args:
        train: Pairs, and comparisons of one response.
        evaluation: So too; may be empty.
        objective: What is trained with.
        selector: From scores to weights; None gives every token weight 1.
        scorer: From stored values to scores; None if there are none.
        store: The values.
        tokenizer: Of the rows' ids.
        with_reference: Called if the objective compares with a reference.
        say: Shows a line.

    Raises:
        UserError: no row can train, or nothing is selected of any.
    """
    rows = trained_on(objective, train, say)
    held = trained_on(objective, evaluation, say) if len(evaluation) else evaluation
    reads_scores, reads_reference = needs_of(objective).scores, needs_of(objective).reference
    if scorer is None or store is None:
        rows, held = (
            with_reference(part) if reads_reference and len(part) else part for part in (rows, held)
        )
        return Prepared(objective, rows, held)
    if is_online(scorer):
        return _online(rows, held, objective, selector, scorer, store, with_reference)
    rows = scored(rows, scorer, store)
    if reads_scores and len(held):
        held = scored(held, scorer, store)
    if reads_reference:
        rows, held = (with_reference(part) if len(part) else part for part in (rows, held))
    if selector is None:
        return Prepared(objective, rows, held)
    if scope_of(selector) == "batch":
        by_step = partial(weigh_step, selector)
        return Prepared(objective, rows, held, lambda batch, step: by_step(batch))
    rows, dropped = weighted(rows, selector, objective, tokenizer)
    return Prepared(objective, rows, held, dropped=dropped)


def _online(
    rows: TokenTable,
    held: TokenTable,
    objective: Objective,
    selector: Selector | None,
    scorer: Scorer,
    store: TokenStore,
    with_reference: WithReference,
) -> Prepared:
    """Rows whose tokens are selected by the policy's own numbers."""
    if selector is not None:
        objective = Selected(objective, selector, scorer)
    rows, held = (with_read_values(part, scorer, store) if len(part) else part for part in (rows, held))
    if needs_of(objective).reference:
        rows, held = (with_reference(part) if len(part) else part for part in (rows, held))
    return Prepared(objective, rows, held, online=True)


def trained_on(objective: Objective, rows: TokenTable, say: Say) -> TokenTable:
    """Rows without the bad responses that stand alone, if the objective learns nothing from such a one.

    Raises:
        UserError: none is left.
    """
    left_out = (rows.sizes == 1) & (rows.ranks[rows.starts[:-1]] > 0)
    if needs_of(objective).unpaired != "good" or not left_out.any():
        return rows
    if left_out.all():
        raise UserError(
            f"every row is a bad response alone, and {title_of(objective)} trains on good ones. Give good ones (label true), or "
            "write the objective {name: kto}, which learns from both."
        )
    say(
        f"  {int(left_out.sum())} rows left out: a bad response alone, from which {title_of(objective)} learns nothing"
    )
    return rows.where(~left_out)


def weighted(
    rows: TokenTable, selector: Selector, objective: Objective, tokenizer: PreTrainedTokenizerBase
) -> tuple[TokenTable, int]:
    """Scored rows with their weights; see :func:`with_some_selected`."""
    return with_some_selected(weigh(rows, selector, tokenizer), objective)


def with_some_selected(found: TokenTable, objective: Objective) -> tuple[TokenTable, int]:
    """Weighted rows without those that lack weights which the objective needs, and how many those are.

    An objective over pairs needs weights on both sides, another one on the best response, or on the only one.

    Raises:
        UserError: no row is left.
    """
    some = selected_counts(found) > 0
    if not needs_of(objective).pairwise:
        sizes = found.sizes
        some |= (found.ranks > 0) & (np.repeat(sizes, sizes) > 1)
    kept = np.minimum.reduceat(some, found.starts[:-1])
    if not kept.any():
        raise UserError(
            "the selection keeps no token of any pair, so there is nothing to train on. Raise policy.selection's fractions, "
            "or lower its threshold."
        )
    return found.where(kept), int((~kept).sum())


def selected_counts(rows: TokenTable) -> np.ndarray:
    """How many tokens of each response have weight.  -> [r]"""
    flat, starts = rows.columns["weights"]
    sizes = rows.lengths
    # Not as lists of numbers, which would take a hundred bytes a pair.
    counts = (np.count_nonzero(flat[first : first + size]) for first, size in zip(starts, sizes, strict=True))
    return np.fromiter(counts, np.int64, len(sizes))


def kept_shares(rows: TokenTable) -> dict[str, float]:
    """Share of the tokens that have weight, of the chosen and of the rejected responses."""
    counts, sizes = selected_counts(rows), rows.lengths
    worse = rows.ranks > 0
    sides = {"chosen": ~worse, "rejected": worse}
    return {name: float(counts[side].sum() / sizes[side].sum()) for name, side in sides.items() if side.any()}


def kept_line(rows: TokenTable, dropped: int) -> str:
    """What is trained, in one line."""
    alone = int((rows.sizes == 1).sum())
    parts = {"pairs": len(rows) - alone, "responses alone": alone}
    count = ", ".join(f"{count} {name}" for name, count in parts.items() if count)
    if "weights" not in rows.columns:
        return f"  {count}; tokens are selected in the step"
    shares = ", ".join(f"{side} {share:.1%}" for side, share in kept_shares(rows).items())
    line = f"  {count}; kept tokens: {shares}"
    return line + (
        f"; {dropped} pairs dropped: nothing selected where the objective needs some" if dropped else ""
    )


def with_new_adapter(model: LanguageModel, settings: dict[str, Any] | None, seed: int) -> LanguageModel:
    """The model with a new adapter to train; without settings the model itself."""
    torch.manual_seed(seed)  # an adapter begins with random weights
    return model if settings is None else model.with_adapter(settings)


def needs_frozen_copy(objective: Objective, model: LanguageModel) -> bool:
    """Whether an objective compares with a second model in the step. A model with an adapter is its own, without it."""
    return needs_of(objective).frozen_reference and not model.has_adapter
