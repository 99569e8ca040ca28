# torch leaves parts of what is used here untyped.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
"""A linear language model head and the softmax in one: the vocabulary goes by in tiles.

All tokens meet one tile of the vocabulary at a time, so that memory is ``n x tile`` whatever the
vocabulary, and each row of the weight's gradient is computed once. Nothing of a tile is kept: the
backward pass makes it again.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenward.ops.logprob import Direction, LinearHead, LogitChange, Reference, TiledSums, by_name, wide

TILED = ("entropy", "kl", "token_rank")
"""Statistics that can be made a tile of the vocabulary at a time; a head is asked for others by chunks of tokens."""

TILE_ELEMENTS = 2**23
"""Logits that exist at once: 32 MB in float32."""


def linear_statistics(
    hidden: Tensor,
    ids: Tensor,
    head: LinearHead,
    names: Sequence[str] = (),
    *,
    reference: Reference | None = None,
    direction: Direction = "reverse",
    dtype: torch.dtype | None = None,
    elements: int = TILE_ELEMENTS,
) -> dict[str, Tensor]:
    """``logp`` and the named statistics of each token in one pass of the head.  [n d], [n] -> [n] each

    Sums over the vocabulary are in float32 or better, whatever the matrix products are in. A rank costs the products
    of the forward pass a second time: what is larger than the token's own logit is counted when that is known.

    Args:
        hidden: State at the position before each token.
        ids: The tokens.
        head: The language model head.
        names: Of :data:`TILED`; see :data:`tokenward.ops.logprob.STATISTICS`.
        reference: The other model, needed for ``kl``.
        direction: ``reverse`` is KL(model || reference), ``forward`` KL(reference || model).
        dtype: Of the matrix products; None is that of the states.
        elements: Logits that may exist at once; changes memory, not the result.
    """
    others, other = (None, (None, None, LogitChange())) if reference is None else reference
    changes = (head.change, other[2])
    entropy, rank = "entropy" in names, "token_rank" in names
    settings = _Settings(entropy, rank, direction == "forward", dtype or hidden.dtype, elements, *changes)
    found = _Tiles.apply(hidden, *head[:2], ids, others, *other[:2], settings)  # type: ignore[misc]
    made: dict[str, Tensor] = dict(zip(("logp", *TILED), found, strict=True))
    return by_name([made["logp"], *(made[name] for name in names)], names)


class _Settings(NamedTuple):
    """What is wanted, and how it is computed.

    Attributes:
        entropy: Whether the entropy is.
        rank: Whether the rank is.
        forward: Whether the KL divergence is that of the reference to the model, where there is one.
        dtype: Of the matrix products.
        elements: Logits that may exist at once.
        change: What the model does to its logits.
        other_change: What the reference does.
    """

    entropy: bool
    rank: bool
    forward: bool
    dtype: torch.dtype
    elements: int
    change: LogitChange
    other_change: LogitChange


class _Side(NamedTuple):
    """One model: states and weights as the matrix products take them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    change: LogitChange

    def raw(self, tile: slice) -> Tensor:
        """What the head itself gives, rounded as a linear layer rounds it.  -> [n tile]"""
        bias = None if self.bias is None else self.bias[tile].to(self.dtype)
        return F.linear(self.hidden, self.weight[tile].to(self.dtype), bias)

    def logits(self, tile: slice) -> Tensor:
        """Logits of one tile.  -> [n tile] float32 or better"""
        return wide(self.change(self.raw(tile)))


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
        settings: _Settings,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.settings = settings
        dtype = settings.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            side = _Side(hidden.to(dtype), weight, bias, dtype, settings.change)
            other = _other(other_hidden, other_weight, other_bias, settings)
            found = _forward(side, other, ids, settings)
            rank = _above(side, found.target, settings.elements) if settings.rank else ids.detach()
        ctx.mark_non_differentiable(rank)
        ctx.save_for_backward(hidden, weight, bias, ids, other_hidden, other_weight, other_bias, *found)
        target, own, average, others, divergence = found
        normalisers = own - others if settings.forward else others - own
        return target - own, own - average, divergence + normalisers, rank

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, grad_logp: Tensor, grad_entropy: Tensor, grad_kl: Tensor, grad_rank: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, other_hidden, other_weight, other_bias, *found = ctx.saved_tensors
        dtype = ctx.settings.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            side = _Side(hidden.to(dtype), weight, bias, dtype, ctx.settings.change)
            other = _other(other_hidden, other_weight, other_bias, ctx.settings)
            grads = _Gradients(
                grad_logp,
                grad_entropy if ctx.settings.entropy else None,
                None if other is None else grad_kl,
                ctx.settings.forward,
            )
            wanted = tuple(bool(flag) for flag in ctx.needs_input_grad[:3])
            states, *weights = _backward(
                side, other, ids, ctx.settings.elements, _Found(*found), grads, wanted
            )
        return (None if states is None else states.to(hidden.dtype), *weights, *(None,) * 5)


class _Found(NamedTuple):
    """What the forward pass found.  [n] each

    Attributes:
        target: Logit of the token.
        own: logsumexp of the model's logits.
        average: Mean logit under the model.
        others: logsumexp of the reference's logits.
        divergence: Mean difference of the two logits: of the model's to the reference's under the model, or the
            other way round under the reference.
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
    forward: bool


def _other(
    hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, settings: _Settings
) -> _Side | None:
    if hidden is None or weight is None:
        return None
    return _Side(hidden.to(settings.dtype), weight, bias, settings.dtype, settings.other_change)


def _tiles(vocabulary: int, tokens: int, elements: int) -> Iterator[slice]:
    tile = max(1, elements // max(1, tokens))
    return (slice(start, min(start + tile, vocabulary)) for start in range(0, vocabulary, tile))


def _forward(side: _Side, other: _Side | None, ids: Tensor, settings: _Settings) -> _Found:
    like = torch.zeros(len(ids), dtype=wide(side.hidden[:0]).dtype, device=ids.device)
    target, own, ours, theirs = like.clone(), TiledSums(like), TiledSums(like), TiledSums(like)
    for part in _tiles(len(side.weight), len(ids), settings.elements):
        logits = side.logits(part)
        target = torch.where(_inside(ids, part), logits.gather(1, _place(ids, part)).squeeze(1), target)
        own.add(logits, logits if settings.entropy else None)
        if other is None:
            continue
        reference = other.logits(part)
        theirs.add(reference, reference - logits if settings.forward else None)
        if not settings.forward:
            ours.add(logits, logits - reference)
    if other is None:
        return _Found(target, own.logsumexp, own.mean, like, like)
    divergence = theirs.mean if settings.forward else ours.mean
    return _Found(target, own.logsumexp, own.mean, theirs.logsumexp, divergence)


def _above(side: _Side, target: Tensor, elements: int) -> Tensor:
    """How many logits are larger than the token's own.  -> [n]

    The tiles are those of the own logit, so the same products give the same numbers: no token is above itself.
    """
    count = torch.zeros_like(target)
    for part in _tiles(len(side.weight), len(target), elements):
        count += (side.logits(part) > target[:, None]).sum(-1)
    return count


def _inside(ids: Tensor, part: slice) -> Tensor:
    return (ids >= part.start) & (ids < part.stop)


def _place(ids: Tensor, part: slice) -> Tensor:
    """Place of each token in a tile; any place where it is not in it.  -> [n 1]"""
    return (ids - part.start).clamp(0, part.stop - part.start - 1)[:, None]


def _backward(
    side: _Side,
    other: _Side | None,
    ids: Tensor,
    elements: int,
    found: _Found,
    grads: _Gradients,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of states, weight and bias."""
    for_hidden = torch.zeros_like(wide(side.hidden)) if wanted[0] else None
    for_weight = torch.empty_like(side.weight) if wanted[1] else None
    for_bias = torch.empty_like(side.bias) if wanted[2] and side.bias is not None else None
    for part in _tiles(len(side.weight), len(ids), elements):
        full = _logit_gradient(side, other, ids, part, found, grads)
        grad = full.to(side.dtype)
        if for_hidden is not None:
            for_hidden += grad @ side.weight[part].to(side.dtype)
        if for_weight is not None:
            for_weight[part] = grad.T @ side.hidden
        if for_bias is not None:
            for_bias[part] = wide(full).sum(0)
    return for_hidden, for_weight, for_bias


def _logit_gradient(side: _Side, other: _Side | None, ids: Tensor, part: slice, *rest: Any) -> Tensor:
    """Gradient of the loss with respect to what the head itself gives of one tile.  -> [n tile]"""
    if not side.change.steps:
        return _by_logits(side.logits(part), other, ids, part, *rest)
    raw = side.raw(part).requires_grad_()
    with torch.enable_grad():
        changed = wide(side.change(raw))
    gradient = _by_logits(changed.detach(), other, ids, part, *rest)
    return torch.autograd.grad(changed, raw, gradient)[0]


def _by_logits(
    logits: Tensor, other: _Side | None, ids: Tensor, part: slice, found: _Found, grads: _Gradients
) -> Tensor:
    """Gradient with respect to the model's logits of one tile, which it overwrites.  -> [n tile]"""
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
    if grads.kl is None or other is None:
        return share * factor
    reference = other.logits(part)
    if grads.forward:
        theirs = (reference - found.others[:, None]).exp()
        return share * (factor + grads.kl[:, None]) - theirs * grads.kl[:, None]
    difference = torch.where(share > 0, logits - reference, 0.0)
    return share * (factor + grads.kl[:, None] * (difference - found.divergence[:, None]))
