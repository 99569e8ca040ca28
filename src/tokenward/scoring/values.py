"""One number of a frozen model for every response token, in batches by length."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tokenward.models.base import TokenModel
from tokenward.ops.ragged import spread_over_segments
from tokenward.tokens.batches import budgeted
from tokenward.tokens.rows import TokenRow

Progress = Callable[[int], None]


@torch.inference_mode()
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
        precision: ``float32`` runs in the weights' own dtype, ``bfloat16`` under autocast.
        tokens_per_batch: Padded tokens read at once.
        progress: Called with the number of responses done.
    """
    model.model.eval()
    results: list[list[Tensor]] = [[] for _ in rows]
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bfloat16")
    for group in budgeted(rows, layout=model.layout, tokens=tokens_per_batch):
        batch = model.collate([rows[index] for index in group])
        with autocast:
            values, read = model.read(model.model, batch.to(model.device))
        values = values.float()
        if read.segment is not None:
            values = spread_over_segments(values, read.segment)
        per_response = iter(
            values.cpu().split(torch.bincount(batch.response, minlength=batch.responses).tolist())
        )
        for index in group:
            results[index] = [next(per_response) for _ in rows[index].encoded.responses]
            if progress is not None:
                progress(len(results[index]))
    return results


def flatten(results: Sequence[Sequence[Tensor]]) -> Iterator[Tensor]:
    """The values of all responses, one after another."""
    for row in results:
        yield from row
