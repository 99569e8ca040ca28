"""Numbers of a frozen model for every response token, in batches by length."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tokenward.models.base import TokenModel
from tokenward.ops.ragged import spread_over_segments
from tokenward.tokens.batches import Batch, budgeted
from tokenward.tokens.rows import Layout, TokenRow

Progress = Callable[[int], None]
Compute = Callable[[Batch], Tensor]
"""From a batch to ``[k n]``, k numbers of each token."""


@torch.inference_mode()
def over_batches(
    model: TokenModel,
    rows: Sequence[TokenRow],
    compute: Compute,
    *,
    precision: str,
    tokens_per_batch: int,
    progress: Progress | None = None,
    layout: Layout | None = None,
    collate: Callable[[Sequence[TokenRow]], Batch] | None = None,
) -> list[list[Tensor]]:
    """Numbers of each token of each response.  -> per row, per response, [k len] float32 on the CPU

    Args:
        model: Put into evaluation mode.
        rows: Comparisons as ids.
        compute: From a batch on the model's device to the numbers.
        precision: ``float32`` runs in the weights' own dtype, ``bfloat16`` under autocast.
        tokens_per_batch: Padded tokens read at once.
        progress: Called with the number of responses done.
        layout: Of the batches, where it is not the model's own.
        collate: From rows to a batch, where it is not the model's own.
    """
    model.model.eval()
    results: list[list[Tensor]] = [[] for _ in rows]
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bfloat16")
    for group in budgeted(rows, layout=layout or model.layout, tokens=tokens_per_batch):
        batch = (collate or model.collate)([rows[index] for index in group])
        with autocast:
            values = compute(batch.to(model.device))
        sizes = torch.bincount(batch.tokens.response, minlength=batch.tokens.responses).tolist()
        per_response = iter(values.float().cpu().split(sizes, dim=1))
        for index in group:
            results[index] = [next(per_response) for _ in rows[index].responses]
            if progress is not None:
                progress(len(results[index]))
    return results


def token_values(
    model: TokenModel,
    rows: Sequence[TokenRow],
    *,
    precision: str,
    tokens_per_batch: int,
    progress: Progress | None = None,
) -> list[list[Tensor]]:
    """Log-probability, or reward, of each token of each response.  -> per row, per response, [len] float32 on the CPU

    Rows with segments get the mean over each segment at every token of it.

    Args:
        model: A language model or a token reward model; put into evaluation mode.
        rows: Comparisons as ids.
        precision: See :func:`over_batches`.
        tokens_per_batch: Padded tokens read at once.
        progress: Called with the number of responses done.
    """

    def compute(batch: Batch) -> Tensor:
        values, read = model.read(model.model, batch)
        values = values.float()
        return (values if read.segment is None else spread_over_segments(values, read.segment))[None]

    found = over_batches(
        model, rows, compute, precision=precision, tokens_per_batch=tokens_per_batch, progress=progress
    )
    return [[response[0] for response in row] for row in found]


def flatten(results: Sequence[Sequence[Tensor]]) -> Iterator[Tensor]:
    """The values of all responses, one after another."""
    for row in results:
        yield from row
