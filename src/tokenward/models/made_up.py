"""Made-up comparisons on which a model is tried when it is loaded."""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokenward.tokens.batches import Batch, collate
from tokenward.tokens.layouts import ModelInputs
from tokenward.tokens.rows import Layout, TokenRow
from tokenward.types import Comparison

SHAPES = ((9, (5, 7, 4)), (5, (3,)))
"""Tokens of the prompt and of each response, comparison by comparison: no two lengths of one comparison are equal."""

CHANGED = 1
"""The response whose tokens are exchanged: it has neighbours on both sides."""


class Trial(NamedTuple):
    """The same rows twice, but for the tokens of one response.

    Attributes:
        inputs: The rows.
        other: With other tokens in response :data:`CHANGED` of the first comparison.
        kept: ``[rows t]`` bool, which places of the rows are no business of those tokens.
    """

    inputs: ModelInputs
    other: ModelInputs
    kept: Tensor


def made_up(model: nn.Module, *, exchanged: bool = False) -> list[TokenRow]:
    """Comparisons of ordinary tokens, no two of them alike as long as the vocabulary lasts.

    Args:
        model: Whose vocabulary they are from.
        exchanged: Whether response :data:`CHANGED` has other tokens.
    """
    ids = _ordinary(model)
    rows = [_encoded(ids, prompt, responses) for prompt, responses in SHAPES]
    if exchanged:
        responses = rows[0].responses
        responses[CHANGED] = list(islice(ids, len(responses[CHANGED])))
    return list(rows)


def laid_out(model: nn.Module, rows: list[TokenRow], layout: Layout, start_id: int | None = None) -> Batch:
    """The rows as a batch on the model's device, each response to its end."""
    batch = collate(rows, layout=layout, pad_id=0, start_id=start_id)
    return batch.to(next(model.parameters()).device)


def trial(model: nn.Module) -> Trial:
    """Packed rows, in which one response changes."""
    inputs, other = (
        laid_out(model, made_up(model, exchanged=changed), "shared").inputs for changed in (False, True)
    )
    assert inputs.tree is not None
    comparison, branch = inputs.tree.owner
    return Trial(inputs, other, ((comparison != 0) | (branch != CHANGED + 1))[None])


def future_trial(model: nn.Module) -> Trial:
    """One row twice, with another second half."""
    ids = _ordinary(model)
    first, second, third = (list(islice(ids, 10)) for _ in range(3))
    rows = ([_comparison(first, [end])] for end in (second, third))
    inputs, other = (laid_out(model, row, "separate").inputs for row in rows)
    return Trial(inputs, other, torch.arange(20, device=inputs.input_ids.device)[None] < 10)


def _encoded(ids: Iterator[int], prompt: int, responses: tuple[int, ...]) -> TokenRow:
    return _comparison(list(islice(ids, prompt)), [list(islice(ids, length)) for length in responses])


def _comparison(prompt: list[int], responses: list[list[int]]) -> TokenRow:
    texts, ranks = ("",) * len(responses), tuple(range(len(responses)))
    comparison = Comparison(key="", prompt=(), responses=texts, ranks=ranks, source="probe")
    return TokenRow(comparison, prompt, responses, [0] * len(responses))


def _ordinary(model: nn.Module) -> Iterator[int]:
    """Ids that the config gives no other meaning; a model may count positions by its pad, or look for an image."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    special = {value for name, value in config.to_dict().items() if name.endswith("_token_id")}
    step = 0
    while True:
        token = (7919 * step + 13) % config.vocab_size
        if token not in special:
            yield token
        step += 1
