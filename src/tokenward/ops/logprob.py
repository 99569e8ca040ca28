# torch leaves parts of what is used here untyped.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
"""Log-probabilities of chosen tokens, from logits or from any head, a chunk of tokens at a time.

A linear head has a faster way, :mod:`tokenward.ops.tiles`. For any other the logits are made for one chunk
of tokens, and again in the backward pass, so that the memory is ``chunk x v`` whatever the number of tokens.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]
"""From hidden states ``[c d]`` to logits ``[c v]``."""

Direction = Literal["forward", "reverse"]
"""Of a KL divergence between a model and its reference: ``forward`` is KL(reference || model), ``reverse``
KL(model || reference)."""

CHUNK = 128
"""Rows whose logits exist at once."""


class TokenStatistics(NamedTuple):
    """What one pass of the head says of each token.

    Attributes:
        logp: ``[n]``, log-probability of the token, nats.
        entropy: ``[n]``, entropy of the whole distribution it was drawn from, nats; None if not asked for.
        kl: ``[n]``, KL divergence to a reference over the whole vocabulary, nats; None if not asked for.
        rank: ``[n]``, how many tokens are more probable, without gradient; None if not asked for.
    """

    logp: Tensor
    entropy: Tensor | None = None
    kl: Tensor | None = None
    rank: Tensor | None = None


def logprobs_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of each id under its row of logits, in float32 or better.  [n v], [n] -> [n]"""
    logits = wide(logits)
    return logits.gather(-1, ids[:, None]).squeeze(-1) - logits.logsumexp(-1)


def entropy_of(logits: Tensor) -> Tensor:
    """Entropy in nats of the full distribution of each row.  [n v] -> [n]"""
    logp = wide(logits).log_softmax(-1)
    # A logit of -inf has probability 0 and adds nothing; 0 * -inf would be NaN, also in the gradient.
    return -(logp.exp() * torch.where(logp > -torch.inf, logp, 0.0)).sum(-1)


def rank_of(logits: Tensor, ids: Tensor) -> Tensor:
    """How many tokens are more probable than each id; equally probable ones are not.  [n v], [n] -> [n]

    In the type of :func:`wide` logits, which holds whole numbers up to 16 million exactly. No gradient.
    """
    logits = wide(logits.detach())
    return (logits > logits.gather(-1, ids[:, None])).sum(-1).to(logits.dtype)


def kl_of(logits: Tensor, reference_logits: Tensor, direction: Direction = "reverse") -> Tensor:
    """KL divergence in nats over the full vocabulary, per row.  [n v], [n v] -> [n]

    Where the first of the two distributions has a probability of 0, one too small to be written included, it adds
    nothing.

    Args:
        logits: Of the model.
        reference_logits: Of the reference.
        direction: ``reverse`` is KL(model || reference), ``forward`` KL(reference || model).
    """
    logp, other = wide(logits).log_softmax(-1), wide(reference_logits).log_softmax(-1)
    if direction == "forward":
        logp, other = other, logp
    share = logp.exp()
    return (share * torch.where(share > 0, logp - other, 0.0)).sum(-1)


def chunked_logprobs(hidden: Tensor, ids: Tensor, head: Head, *, chunk: int = CHUNK) -> Tensor:
    """Log-probability of each token from the hidden state that predicts it.  [n d], [n] -> [n]

    See :func:`chunked_statistics`.
    """
    return chunked_statistics(hidden, ids, head, chunk=chunk).logp


def chunked_statistics(
    hidden: Tensor,
    ids: Tensor,
    head: Head,
    *,
    entropy: bool = False,
    rank: bool = False,
    reference: tuple[Tensor, Head] | None = None,
    direction: Direction = "reverse",
    chunk: int = CHUNK,
) -> TokenStatistics:
    """Log-probability, and on request entropy, KL and rank, of each token in one pass of the head.  [n d], [n] -> [n]

    Args:
        hidden: State at the position before each token.
        ids: The tokens.
        head: The language model head, called on ``chunk`` rows at a time.
        entropy: Whether the entropy is wanted; it comes from the same logits.
        rank: Whether the rank is.
        reference: If given, the KL divergence is wanted: the reference's states at the same positions, and its head.
        direction: See :func:`kl_of`.
        chunk: Rows whose logits exist at once; changes memory, not the result.
    """

    def piece(rows: Tensor, targets: Tensor, reference_rows: Tensor | None = None) -> Tensor:
        logits = head(rows)
        found = [logprobs_of(logits, targets)]
        if entropy:
            found.append(entropy_of(logits))
        if reference is not None and reference_rows is not None:
            found.append(kl_of(logits, reference[1](reference_rows), direction))
        if rank:
            found.append(rank_of(logits, targets))
        return torch.stack(found)

    rows = [hidden, ids] if reference is None else [hidden, ids, reference[0]]
    parts = zip(*(item.split(chunk) for item in rows), strict=True)
    values = iter(torch.cat([_recomputed(piece, *part) for part in parts], dim=1))
    return statistics_of(values, entropy=entropy, divergence=reference is not None, rank=rank)


def statistics_of(
    values: Iterator[Tensor], *, entropy: bool, divergence: bool, rank: bool
) -> TokenStatistics:
    """Statistics that come one after another, only those that were asked for."""
    logp = next(values)
    entropies = next(values) if entropy else None
    kl = next(values) if divergence else None
    return TokenStatistics(logp, entropies, kl, next(values).detach() if rank else None)


def wide(logits: Tensor) -> Tensor:
    """The same numbers in float32 or better: half precision is too coarse for a sum over a vocabulary."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _recomputed(piece: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return piece(*inputs)
    return checkpoint(piece, *inputs, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]
