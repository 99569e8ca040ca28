# torch leaves parts of what is used here untyped.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
"""Token statistics from hidden states, embeddings and attention."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenward.ops.logprob import CHUNK, Head, entropy_of, rank_of, wide
from tokenward.ops.transforms import min_max, standardise


def tied_embedding(ids: Tensor, weight: Tensor, padding: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows of an embedding, and its weight for the head.  [...], [v d] -> [... d], [v d]

    The weight that is returned must be used for one thing, whose gradient is a tensor that nobody else holds: it
    is changed in place.

    Args:
        ids: Tokens.
        weight: Of embedding and head.
        padding: Token whose row gets no gradient from the embedding.
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


def entropy_and_rank(hidden: Tensor, ids: Tensor, head: Head, *, chunk: int = CHUNK) -> Tensor:
    """Entropy of the distribution, nats, and how many tokens are more probable than each.  [n d], [n] -> [2 n]

    Args:
        hidden: State at the position before each token.
        ids: The tokens.
        head: From states to logits, called on ``chunk`` rows at a time; no more logits exist at once.
        chunk: Changes memory, not the result.
    """
    parts = [hidden.new_zeros((2, 0)).float()]
    for rows, targets in zip(hidden.split(chunk), ids.split(chunk), strict=True):
        logits = wide(head(rows))
        parts.append(torch.stack((entropy_of(logits), rank_of(logits, targets))).float())
    return torch.cat(parts, dim=1)


def other_tokens(hidden: Tensor, ids: Tensor, head: Head, count: int, *, chunk: int = CHUNK) -> Tensor:
    """The most probable tokens that are not the one that stands there, most probable first.  [n d], [n] -> [n count]"""
    parts = [ids.new_zeros((0, count))]
    for rows, targets in zip(hidden.split(chunk), ids.split(chunk), strict=True):
        logits = wide(head(rows)).scatter(-1, targets[:, None], -torch.inf)
        parts.append(logits.topk(count, dim=-1).indices)
    return torch.cat(parts)


def mean_logit(hidden: Tensor, head: Head, *, chunk: int = CHUNK) -> Tensor:
    """Mean over the vocabulary of the logits at each position.  [n d] -> [n]"""
    parts = [hidden.new_zeros(0).float()]
    return torch.cat(parts + [wide(head(rows)).mean(-1).float() for rows in hidden.split(chunk)])


def received_attention(weights: Tensor, real: Tensor) -> Tensor:
    """Attention that each position receives: mean over heads and over the positions that see it.  -> [rows t]

    Args:
        weights: ``[rows heads t t]``, of each position (third) to each (fourth); a position sees itself and those before.
        real: ``[rows t]`` bool, whether a position is no padding.
    """
    looking = torch.where(real[:, :, None], weights.float().mean(1), 0.0)
    seen_by = real.long().flip(1).cumsum(1).flip(1)
    return looking.sum(1) / seen_by.clamp(min=1)


def activation_mask(kinds: Sequence[Tensor], response: Tensor, responses: int) -> Tensor:
    """MaPO's mask (arXiv 2410.05102): activations made comparable within a response, and averaged.  -> [n] in [0, 1]

    Args:
        kinds: Per kind of place in a model ``[layers n]``, the mean over its features.
        response: ``[n]``, which response owns the token.
        responses: How many there are.
    """
    means = [
        torch.stack(
            [min_max(standardise(layer, response, responses), response, responses) for layer in kind]
        ).mean(0)
        for kind in kinds
    ]
    return torch.stack(means).mean(0)


def cosine(vectors: Tensor, other: Tensor) -> Tensor:
    """Cosine of each vector with another one; 0 where one is all 0.  [n d], [d] -> [n]"""
    return torch.nn.functional.cosine_similarity(vectors.float(), other.float()[None], dim=-1)
