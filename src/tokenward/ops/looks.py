# torch leaves parts of what is used here untyped.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
"""What can be read off a frozen model at each token, beside its log-probability."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenward.ops.logprob import CHUNK, Head, entropy_of, rank_of, wide
from tokenward.ops.transforms import min_max, standardise


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
