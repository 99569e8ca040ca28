"""Per-token log-probabilities of a batch: the one path from a model to numbers."""

from typing import Any

import torch
from torch import Tensor, nn

from tokenward.models.head import SelectiveHead
from tokenward.ops.logprob import chunked_kl, logprobs_of
from tokenward.tokens.rows import TokenBatch


def token_logprobs(model: nn.Module, head: SelectiveHead | None, batch: TokenBatch) -> Tensor:
    """Log-probability of each response token whose weight is not zero; 0 elsewhere.  -> [n] float32

    Args:
        model: The model, or a wrapper around it; its ``forward`` is called.
        head: The head of that model, None to make all logits.
        batch: The rows, on the model's device.
    """
    positions, ids = batch.predicted_from[batch.kept], batch.ids[batch.kept]
    if head is None:
        logits = _run(model, batch)
        logp = logprobs_of(logits.reshape(-1, logits.shape[-1])[positions], ids)
    else:
        with head.answering(positions, ids):
            logp = _run(model, batch)
    return logp.new_zeros(len(batch.ids)).index_put((batch.kept,), logp)


@torch.inference_mode()
def token_kl(
    model: nn.Module,
    head: SelectiveHead | None,
    reference: nn.Module,
    reference_head: SelectiveHead | None,
    batch: TokenBatch,
) -> Tensor:
    """KL(model || reference) over the whole vocabulary at each response token.  -> [n] float32"""
    states, to_logits = _states(model, head, batch)
    reference_states, reference_to_logits = _states(reference, reference_head, batch)
    return chunked_kl(states, reference_states, to_logits, reference_to_logits)


def _states(model: nn.Module, head: SelectiveHead | None, batch: TokenBatch) -> tuple[Tensor, Any]:
    """What the head needs at each predicting position, and the function from there to logits."""
    if head is None:
        logits = _run(model, batch)
        return logits.reshape(-1, logits.shape[-1])[batch.predicted_from], lambda rows: rows
    with head.answering(batch.predicted_from, None):
        return _run(model, batch), head.logits


def _run(model: nn.Module, batch: TokenBatch) -> Tensor:
    outputs = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    )
    return outputs.logits
