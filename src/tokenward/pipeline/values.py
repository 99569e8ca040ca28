"""Stored values onto rows: reference log-probabilities, scores, weights."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.pipeline.context import Run
from tokenward.pipeline.data import response_keys
from tokenward.plugins import build, check_call
from tokenward.scoring.scorers import SCORERS, Scorer
from tokenward.scoring.store import TokenRecord, TokenStore
from tokenward.selection import ScoredTokens, Selector
from tokenward.tokens.rows import TokenRow


def scorer_of(run: Run) -> Scorer:
    """The scorer that the recipe names."""
    table = run.recipe.scores.scorer
    scorer = build("scorer", table.name, table.arguments, SCORERS)
    check_call("scorer", table.name, scorer, ("record",))
    return scorer


def records_of(store: TokenStore, row: TokenRow) -> list[TokenRecord]:
    """What the store holds of a row's responses.

    Raises:
        UserError: it holds other tokens: another tokenizer, template or limit made it.
    """
    records = [store[key] for key in response_keys(row.encoded)]
    for record, ids in zip(records, row.encoded.responses, strict=True):
        if record.ids != ids:
            raise UserError(
                f"the tokens in {store.folder} are not those of this model: {row.encoded.comparison.source} has "
                f"{len(ids)} tokens here and {len(record.ids)} there, or other ids. Oracle and policy must share a "
                "tokenizer and the tokens table; use the same family of models, or score again."
            )
    return records


def with_reference(run: Run, rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Rows with the reference log-probabilities of the reference stage."""
    store = TokenStore(run.path("reference"))
    return [
        replace(row, reference_logp=[record.value("reference_logp") for record in records_of(store, row)])
        for row in rows
    ]


def scored_rows(run: Run, rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Rows with the scores of the score store, by the recipe's scorer."""
    store, scorer = TokenStore(run.path("scores")), scorer_of(run)
    return [replace(row, scores=scores_of(scorer, records_of(store, row))) for row in rows]


def scores_of(scorer: Scorer, records: Sequence[TokenRecord]) -> list[Tensor]:
    """Scores of stored responses.  [n] each

    Raises:
        UserError: a scorer of one's own returned anything but one number per token.
    """
    scores = []
    for record in records:
        values = _numbers("scorer", scorer, scorer(record))
        if values.shape != (len(record.ids),):
            raise UserError(
                f"the scorer {scorer} gave {tuple(values.shape)} numbers for a response of {len(record.ids)} tokens. "
                "It must give one per token."
            )
        scores.append(values)
    return scores


def _numbers(kind: str, made: Scorer | Selector, returned: object) -> Tensor:
    """What a scorer or selector returned, a list or an array too, as float32."""
    try:
        return torch.as_tensor(returned, dtype=torch.float32)
    except (
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:  # torch raises each of them for one value or another
        raise UserError(
            f"the {kind} {made} returned a {type(returned).__name__} that is no list of numbers ({error}). Return a tensor, an "
            "array or a list with one number per token."
        ) from error


def weigh_rows(selector: Selector, rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Rows with the weights that a selector gives to their scores."""
    tokens = scored_tokens(rows)
    weights = _numbers("selector", selector, selector(tokens))
    if (
        weights.shape != tokens.scores.shape
        or bool((weights < 0).any())
        or not bool(weights.isfinite().all())
    ):
        raise UserError(
            f"the selector {selector} must give one finite weight >= 0 per token ({len(tokens.scores)}), got shape "
            f"{tuple(weights.shape)}, least {float(weights.min()):.3g}, largest {float(weights.max()):.3g}."
        )
    parts = iter(weights.split([len(ids) for row in rows for ids in row.encoded.responses]))
    return [replace(row, weights=[next(parts) for _ in row.encoded.responses]) for row in rows]


def weigh_batch(selector: Selector, rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Weights of the comparisons of one batch, among which the selector chooses.

    A comparison in a batch cannot be dropped any more, so a response of which nothing was kept keeps the one
    token that speaks most for its side.
    """
    weighted = weigh_rows(selector, rows)
    return [
        replace(row, weights=[_at_least_one(row, side) for side in range(len(row.scores or ()))])
        for row in weighted
    ]


def _at_least_one(row: TokenRow, side: int) -> Tensor:
    assert row.weights is not None
    assert row.scores is not None
    weights, scores = row.weights[side], row.scores[side].nan_to_num(0.0)
    if bool((weights != 0).any()):
        return weights
    best = scores.argmax() if row.encoded.comparison.ranks[side] == 0 else scores.argmin()
    return torch.zeros_like(weights).index_fill(0, best, 1.0)


def scored_tokens(rows: Sequence[TokenRow]) -> ScoredTokens:
    """Scores of rows laid end to end, as a selector takes them."""
    encoded = [row.encoded for row in rows]
    lengths = torch.tensor([len(ids) for item in encoded for ids in item.responses])
    closing = [
        _closing(len(ids), item.closing if closed else 0)
        for item in encoded
        for ids, closed in zip(item.responses, item.closed, strict=True)
    ]
    seeds = [int(key, 16) >> 1 for item in encoded for key in response_keys(item)]
    return ScoredTokens(
        scores=torch.cat([score for row in rows for score in row.scores or ()]),
        response=torch.repeat_interleave(torch.arange(len(lengths)), lengths),
        comparison=torch.repeat_interleave(
            torch.arange(len(encoded)), torch.tensor([len(e.responses) for e in encoded])
        ),
        rank=torch.tensor([rank for item in encoded for rank in item.comparison.ranks]),
        closing=torch.cat(closing),
        seeds=torch.tensor(seeds),
    )


def _closing(length: int, count: int) -> Tensor:
    return torch.arange(length) >= length - count
