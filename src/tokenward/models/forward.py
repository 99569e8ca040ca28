"""Per-token log-probabilities of a batch: the one path from a model to numbers."""

from typing import Any

import torch
from torch import Tensor, nn

from tokenward.models.head import SelectiveHead, product_type
from tokenward.ops.logprob import TokenStatistics, chunked_kl, entropy_of, logprobs_of
from tokenward.ops.tiles import Reference, linear_statistics
from tokenward.tokens.rows import TokenBatch


def token_logprobs(model: nn.Module, head: SelectiveHead | None, batch: TokenBatch) -> Tensor:
    """Log-probability of each response token whose weight is not zero; 0 elsewhere.  -> [n] float32

    See :func:`token_statistics`.
    """
    return token_statistics(model, head, batch).logp


def token_statistics(
    model: nn.Module, head: SelectiveHead | None, batch: TokenBatch, *, entropy: bool = False
) -> TokenStatistics:
    """Log-probability, and on request entropy, of each response token whose weight is not zero.  -> [n] float32

    Tokens without weight get 0.

    Args:
        model: The model, or a wrapper around it; its ``forward`` is called.
        head: The head of that model, None to make all logits.
        batch: The rows, on the model's device.
        entropy: Whether the entropy of the whole distribution is wanted too.
    """
    positions, ids = batch.predicted_from[batch.kept], batch.ids[batch.kept]
    if head is None:
        logits = run_model(model, batch).logits
        logits = logits.reshape(-1, logits.shape[-1])[positions]
        found = TokenStatistics(logprobs_of(logits, ids), entropy_of(logits) if entropy else None)
    else:
        with head.answering(positions, ids, entropy=entropy):
            answer = run_model(model, batch).logits
        found = TokenStatistics(answer[0], answer[1]) if entropy else TokenStatistics(answer)
    entropies = None if found.entropy is None else _at_kept(found.entropy, batch)
    return TokenStatistics(_at_kept(found.logp, batch), entropies)


def _at_kept(values: Tensor, batch: TokenBatch) -> Tensor:
    return values.new_zeros(len(batch.ids)).index_put((batch.kept,), values)


@torch.inference_mode()
def token_kl(
    model: nn.Module,
    head: SelectiveHead | None,
    reference: nn.Module,
    reference_head: SelectiveHead | None,
    batch: TokenBatch,
) -> Tensor:
    """KL(model || reference) over the whole vocabulary at each response token.  -> [n] float32"""
    mine, theirs = (None if item is None else item.linear for item in (head, reference_head))
    states, to_logits = _states(model, head, batch)
    reference_states, reference_to_logits = _states(reference, reference_head, batch)
    if mine is None or theirs is None:
        return chunked_kl(states, reference_states, to_logits, reference_to_logits)
    other = Reference(reference_states, theirs)
    found = linear_statistics(states, batch.ids, mine, reference=other, dtype=product_type(states))
    assert found.kl is not None
    return found.kl


def _states(model: nn.Module, head: SelectiveHead | None, batch: TokenBatch) -> tuple[Tensor, Any]:
    """What the head needs at each predicting position, and the function from there to logits."""
    if head is None:
        logits = run_model(model, batch).logits
        return logits.reshape(-1, logits.shape[-1])[batch.predicted_from], lambda rows: rows
    with head.answering(batch.predicted_from, None):
        return run_model(model, batch).logits, head.logits


def run_model(model: nn.Module, batch: TokenBatch) -> Any:
    """The model's own output for a batch: the one place where a batch meets a ``forward``."""
    if batch.decoder_ids is not None:
        return model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            decoder_input_ids=batch.decoder_ids,
            use_cache=False,
        )
    # Without a tree the argument is left out: a model with an attention of its own need not know it.
    tree = {} if batch.tree is None else {"tree": batch.tree}
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        **tree,
    )
