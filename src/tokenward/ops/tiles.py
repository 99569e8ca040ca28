# torch leaves parts of what is used here untyped.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
"""A linear language model head and the softmax in one: the vocabulary goes by in tiles.

All tokens meet one tile of the vocabulary at a time, so that memory is ``n x tile`` whatever the
vocabulary, and each row of the weight's gradient is computed once. Nothing of a tile is kept: the
backward pass makes it again.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenward.ops.logprob import TokenStatistics, wide

TILE_ELEMENTS = 2**23
"""Logits that exist at once: 32 MB in float32."""


class LinearHead(NamedTuple):
    """The weights of a linear language model head.

    Attributes:
        weight: ``[v d]``.
        bias: ``[v]`` or None.
    """

    weight: Tensor
    bias: Tensor | None = None


class Reference(NamedTuple):
    """The model to which a KL divergence is taken; it gets no gradient.

    Attributes:
        hidden: ``[n d]``, its hidden states at the same positions.
        head: Its head, over the same vocabulary.
    """

    hidden: Tensor
    head: LinearHead


def linear_statistics(
    hidden: Tensor,
    ids: Tensor,
    head: LinearHead,
    *,
    entropy: bool = False,
    reference: Reference | None = None,
    dtype: torch.dtype | None = None,
    elements: int = TILE_ELEMENTS,
) -> TokenStatistics:
    """Log-probability, and on request entropy and KL, of each token in one pass of the head.  [n d], [n] -> [n]

    Sums over the vocabulary are in float32 or better, whatever the matrix products are in.

    Args:
        hidden: State at the position before each token.
        ids: The tokens.
        head: The language model head.
        entropy: Whether the entropy of the whole distribution is wanted, in nats.
        reference: If given, KL(model || reference) over the whole vocabulary is wanted, in nats.
        dtype: Of the matrix products; None is that of the states.
        elements: Logits that may exist at once; changes memory, not the result.
    """
    other = (None, None, None) if reference is None else (reference.hidden, *reference.head)
    found = _Tiles.apply(hidden, *head, ids, *other, entropy, dtype or hidden.dtype, elements)
    logp, entropies, kl = found  # type: ignore[misc]
    return TokenStatistics(logp, entropies if entropy else None, None if reference is None else kl)


class _Side(NamedTuple):
    """One model: states and weights as the matrix products take them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype

    def logits(self, tile: slice) -> Tensor:
        """Logits of one tile.  -> [n tile] float32 or better"""
        found = wide(self.hidden @ self.weight[tile].to(self.dtype).T)
        return found if self.bias is None else found + self.bias[tile]


class _Sums:
    """Sums over the vocabulary so far, each relative to the largest logit so far.  [n] each"""

    def __init__(self, like: Tensor) -> None:
        self.peak = torch.full_like(like, -torch.inf)
        self.total, self.first = torch.zeros_like(like), torch.zeros_like(like)

    def add(self, logits: Tensor, values: Tensor | None) -> None:
        """One tile, and what shall be averaged over the distribution."""
        peak = torch.maximum(self.peak, logits.amax(-1))
        finite = torch.where(peak.isfinite(), peak, 0.0)
        share = (logits - finite[:, None]).exp_()
        before = (self.peak - finite).exp()
        self.total = self.total * before + share.sum(-1)
        if values is not None:
            # A probability of 0 adds nothing, also where the value is not finite.
            self.first = self.first * before + torch.where(share > 0, values * share, 0.0).sum(-1)
        self.peak = peak

    @property
    def logsumexp(self) -> Tensor:
        """Of all logits."""
        return self.peak + self.total.log()

    @property
    def mean(self) -> Tensor:
        """Of the values, under the distribution."""
        return self.first / self.total


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        other_hidden: Tensor | None,
        other_weight: Tensor | None,
        other_bias: Tensor | None,
        entropy: bool,
        dtype: torch.dtype,
        elements: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tile = max(1, elements // max(1, len(ids)))
        ctx.settings = (tile, dtype, entropy)
        with torch.autocast(hidden.device.type, enabled=False):
            side = _Side(hidden.to(dtype), weight, bias, dtype)
            other = _other(other_hidden, other_weight, other_bias, dtype)
            found = _forward(side, other, ids, tile, entropy)
        ctx.save_for_backward(hidden, weight, bias, ids, other_hidden, other_weight, other_bias, *found)
        target, own, average, others, divergence = found
        return target - own, own - average, divergence - own + others

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, grad_logp: Tensor, grad_entropy: Tensor, grad_kl: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, other_hidden, other_weight, other_bias, *found = ctx.saved_tensors
        tile, dtype, entropy = ctx.settings
        with torch.autocast(hidden.device.type, enabled=False):
            side = _Side(hidden.to(dtype), weight, bias, dtype)
            other = _other(other_hidden, other_weight, other_bias, dtype)
            grads = _Gradients(
                grad_logp, grad_entropy if entropy else None, None if other is None else grad_kl
            )
            wanted = tuple(bool(flag) for flag in ctx.needs_input_grad[:3])
            states, *weights = _backward(side, other, ids, tile, _Found(*found), grads, wanted)
        return (None if states is None else states.to(hidden.dtype), *weights, *(None,) * 7)


class _Found(NamedTuple):
    """What the forward pass found.  [n] each

    Attributes:
        target: Logit of the token.
        own: logsumexp of the model's logits.
        average: Mean logit under the model.
        others: logsumexp of the reference's logits.
        divergence: Mean difference of the two logits under the model.
    """

    target: Tensor
    own: Tensor
    average: Tensor
    others: Tensor
    divergence: Tensor


class _Gradients(NamedTuple):
    """Of the loss, with respect to each statistic; None where it was not asked for.  [n] each"""

    logp: Tensor
    entropy: Tensor | None
    kl: Tensor | None


def _other(
    hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> _Side | None:
    if hidden is None or weight is None:
        return None
    return _Side(hidden.to(dtype), weight, bias, dtype)


def _tiles(vocabulary: int, tile: int) -> Iterator[slice]:
    return (slice(start, min(start + tile, vocabulary)) for start in range(0, vocabulary, tile))


def _forward(side: _Side, other: _Side | None, ids: Tensor, tile: int, entropy: bool) -> _Found:
    like = torch.zeros(len(ids), dtype=wide(side.hidden[:0]).dtype, device=ids.device)
    target, own, ours, theirs = like.clone(), _Sums(like), _Sums(like), _Sums(like)
    for part in _tiles(len(side.weight), tile):
        logits = side.logits(part)
        target = torch.where(_inside(ids, part), logits.gather(1, _place(ids, part)).squeeze(1), target)
        own.add(logits, logits if entropy else None)
        if other is not None:
            reference = other.logits(part)
            theirs.add(reference, None)
            ours.add(logits, logits - reference)
    if other is None:
        return _Found(target, own.logsumexp, own.mean, like, like)
    return _Found(target, own.logsumexp, own.mean, theirs.logsumexp, ours.mean)


def _inside(ids: Tensor, part: slice) -> Tensor:
    return (ids >= part.start) & (ids < part.stop)


def _place(ids: Tensor, part: slice) -> Tensor:
    """Place of each token in a tile; any place where it is not in it.  -> [n 1]"""
    return (ids - part.start).clamp(0, part.stop - part.start - 1)[:, None]


def _backward(
    side: _Side,
    other: _Side | None,
    ids: Tensor,
    tile: int,
    found: _Found,
    grads: _Gradients,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of states, weight and bias."""
    for_hidden = torch.zeros_like(wide(side.hidden)) if wanted[0] else None
    for_weight = torch.empty_like(side.weight) if wanted[1] else None
    for_bias = torch.empty_like(side.bias) if wanted[2] and side.bias is not None else None
    for part in _tiles(len(side.weight), tile):
        full = _logit_gradient(side, other, ids, part, found, grads)
        grad = full.to(side.dtype)
        if for_hidden is not None:
            for_hidden += grad @ side.weight[part].to(side.dtype)
        if for_weight is not None:
            for_weight[part] = grad.T @ side.hidden
        if for_bias is not None:
            for_bias[part] = full.sum(0)
    return for_hidden, for_weight, for_bias


def _logit_gradient(
    side: _Side, other: _Side | None, ids: Tensor, part: slice, found: _Found, grads: _Gradients
) -> Tensor:
    """Gradient of the loss with respect to the logits of one tile.  -> [n tile]"""
    logits = side.logits(part)
    # Each statistic's derivative by a logit is the share times something, but for the token's own logit.
    if grads.entropy is None and grads.kl is None:
        gradient = logits.sub_(found.own[:, None]).exp_().mul_(-grads.logp[:, None])
    else:
        gradient = _share_times_factors(logits, other, part, found, grads)
    mine = torch.where(_inside(ids, part), grads.logp, 0.0)
    return gradient.scatter_add_(1, _place(ids, part), mine[:, None])


def _share_times_factors(
    logits: Tensor, other: _Side | None, part: slice, found: _Found, grads: _Gradients
) -> Tensor:
    """As above without the token's own logit, where entropy or KL is wanted.  -> [n tile]"""
    logp = logits - found.own[:, None]
    share = logp.exp()
    factor = -grads.logp[:, None]
    if grads.entropy is not None:
        entropy = (found.own - found.average)[:, None]
        factor = factor - grads.entropy[:, None] * (torch.where(share > 0, logp, 0.0) + entropy)
    if grads.kl is not None and other is not None:
        difference = torch.where(share > 0, logits - other.logits(part), 0.0)
        factor = factor + grads.kl[:, None] * (difference - found.divergence[:, None])
    return share * factor
