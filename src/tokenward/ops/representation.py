# torch leaves parts of what is used here untyped.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
"""Token statistics from hidden states, embeddings and attention."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenward.ops.logprob import CHUNK, Head, entropy_of, rank_of, wide
from tokenward.ops.transforms import min_max, standardise


def tied_embedding(ids: Tensor, weight: Tensor, padding: int | None = None) -> tuple[Tensor, Tensor]:
    """Embedding lookup for a weight that is tied to the head.  [...], [v d] -> [... d], [v d]

    Use the returned weight exactly once, in an operation that passes a freshly made gradient: the gradient of the rows
    is added to it in place, so that embedding and head share one gradient tensor of the size of the vocabulary.

    The row of the token ``padding`` gets no gradient from the embedding.
    """
    rows, for_head = _Tied.apply(weight, ids, padding)  # type: ignore[misc]
    return rows, for_head


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, weight: Tensor, ids: Tensor, padding: int | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        ctx.padding, ctx.shape = padding, weight.shape
        # Without this, autograd would allocate zeros of the size of the vocabulary for an unused output.
        ctx.set_materialize_grads(False)
        return F.embedding(ids, weight), weight.detach()

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, of_rows: Tensor | None, of_head: Tensor | None
    ) -> tuple[Tensor | None, None, None]:
        (ids,) = ctx.saved_tensors
        if of_rows is None:
            return of_head, None, None
        total = of_rows.new_zeros(ctx.shape) if of_head is None else of_head
        flat, slopes = ids.reshape(-1), of_rows.reshape(-1, of_rows.shape[-1])
        if ctx.padding is not None:
            slopes = slopes.masked_fill((flat == ctx.padding)[:, None], 0.0)
        return total.index_add_(0, flat, slopes.to(total.dtype)), None, None


def _by_chunks(
    function: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, ids: Tensor, head: Head, chunk: int
) -> list[Tensor]:
    """Apply a function of logits and ids to ``chunk`` rows at a time, so that no more logits exist at once."""
    parts = zip(hidden.split(chunk), ids.split(chunk), strict=True)
    return [function(wide(head(rows)), targets) for rows, targets in parts]


def entropy_and_rank(hidden: Tensor, ids: Tensor, head: Head, *, chunk: int = CHUNK) -> Tensor:
    """Entropy in nats, and the number of tokens that are more probable than each.  [n d], [n] -> [2 n]

    ``hidden`` is the state before each token. No more than ``chunk`` rows of logits exist at the same time.
    """

    def both(logits: Tensor, targets: Tensor) -> Tensor:
        return torch.stack((entropy_of(logits), rank_of(logits, targets))).float()

    return torch.cat(_by_chunks(both, hidden, ids, head, chunk), dim=1)


def other_tokens(hidden: Tensor, ids: Tensor, head: Head, count: int, *, chunk: int = CHUNK) -> Tensor:
    """The most probable tokens other than the given one, most probable first.  [n d], [n] -> [n count]"""

    def best(logits: Tensor, targets: Tensor) -> Tensor:
        return logits.scatter(-1, targets[:, None], -torch.inf).topk(count, dim=-1).indices

    return torch.cat(_by_chunks(best, hidden, ids, head, chunk))


def mean_logit(hidden: Tensor, head: Head, *, chunk: int = CHUNK) -> Tensor:
    """Mean of the logits over the vocabulary at each position.  [n d] -> [n]"""
    return torch.cat([wide(head(rows)).mean(-1).float() for rows in hidden.split(chunk)])


def received_attention(weights: Tensor, real: Tensor) -> Tensor:
    """Attention that each position receives, averaged over heads and the positions that see it.  -> [rows t]

    Args:
        weights: ``[rows heads t t]``, attention from each query position (dim 2) to each key position (dim 3), causal.
        real: ``[rows t]`` bool, False for padding.
    """
    looking = torch.where(real[:, :, None], weights.float().mean(1), 0.0)
    seen_by = real.long().flip(1).cumsum(1).flip(1)
    return looking.sum(1) / seen_by.clamp(min=1)


def activation_mask(kinds: Sequence[Tensor], response: Tensor, responses: int) -> Tensor:
    """MaPO's mask (arXiv 2410.05102): activations scaled to [0, 1] within each response, then averaged.  -> [n]

    Args:
        kinds: For each kind of module ``[layers n]``, the activations averaged over features.
        response: ``[n]``, response that owns each token.
        responses: Number of responses.
    """
    means = [
        torch.stack(
            [min_max(standardise(layer, response, responses), response, responses) for layer in kind]
        ).mean(0)
        for kind in kinds
    ]
    return torch.stack(means).mean(0)


def cosine(vectors: Tensor, other: Tensor) -> Tensor:
    """Cosine similarity of each vector with another one; 0 for a zero vector.  [n d], [d] -> [n]"""
    return F.cosine_similarity(vectors.float(), other.float()[None], dim=-1)
