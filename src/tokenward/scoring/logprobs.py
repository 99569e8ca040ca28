"""Log-probabilities of every response token under a frozen model, in batches by length."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tokenward.models.forward import token_logprobs
from tokenward.models.loading import LanguageModel
from tokenward.tokens.batches import budgeted
from tokenward.tokens.rows import TokenRow, collate

Progress = Callable[[int], None]


@torch.inference_mode()
def response_logprobs(
    model: LanguageModel,
    rows: Sequence[TokenRow],
    *,
    precision: str,
    tokens_per_batch: int,
    progress: Progress | None = None,
) -> list[list[Tensor]]:
    """Log-probability of each token of each response.  -> per row, per response, [len] float32 on the CPU

    Args:
        model: The model; put into evaluation mode.
        rows: Comparisons as ids.
        precision: ``float32`` runs in the weights' own dtype, ``bfloat16`` under autocast.
        tokens_per_batch: Padded tokens read at once.
        progress: Called with the number of responses done.
    """
    model.model.eval()
    results: list[list[Tensor]] = [[] for _ in rows]
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bfloat16")
    for group in budgeted(rows, layout=model.layout, tokens=tokens_per_batch):
        batch = collate([rows[index] for index in group], layout=model.layout, pad_id=model.pad_id)
        with autocast:
            logp = token_logprobs(model.model, model.head, batch.to(model.device)).float().cpu()
        per_response = iter(logp.split(torch.bincount(batch.response, minlength=batch.responses).tolist()))
        for index in group:
            results[index] = [next(per_response) for _ in rows[index].encoded.responses]
            if progress is not None:
                progress(len(results[index]))
    return results


def flatten(results: Sequence[Sequence[Tensor]]) -> Iterator[Tensor]:
    """The values of all responses, one after another."""
    for row in results:
        yield from row
