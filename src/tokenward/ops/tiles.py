# torch leaves parts of what is used here untyped.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
"""A linear language model head fused with the softmax, one tile of the vocabulary at a time.

Chunks of the vocabulary instead of chunks of tokens: memory is ``n x tile`` for any vocabulary, and each row of the
weight's gradient is written once instead of accumulated per chunk. The logits of a tile are not saved; the backward pass
recomputes them.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenward.ops.logprob import UNCHANGED, Direction, LinearHead, LogitChange, Reference, by_name, wide

TILED = ("entropy", "kl", "token_rank")
"""Statistics that can be computed by tiles; others need chunks of tokens with all their logits."""

TILE_ELEMENTS = 2**23
"""Logits that exist at the same time: 32 MB in float32."""


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
    """``logp`` and the named :data:`TILED` statistics of each token from one pass of the head.  [n d], [n] -> [n] each

    ``hidden`` is the state before each token; ``kl`` needs ``reference``. Matrix products are in ``dtype``, by default that of
    the states, and ``elements`` logits exist at the same time, which affects memory, not the result.

    Sums over the vocabulary are in float32 or float64, whatever the dtype of the products. A rank costs a second pass of
    products, because the token's own logit must be known before larger ones can be counted.
    """
    others = (None, None, None) if reference is None else (reference.hidden, *reference.head[:2])
    other_change = UNCHANGED if reference is None else reference.head.change
    settings = _Settings(
        "entropy" in names, "token_rank" in names, direction == "forward", dtype or hidden.dtype, elements,
        head.change, other_change,
    )  # fmt: skip
    found = _Tiles.apply(hidden, *head[:2], ids, *others, settings)  # type: ignore[misc]
    made: dict[str, Tensor] = dict(zip(("logp", *TILED), found, strict=True))
    return by_name([made["logp"], *(made[name] for name in names)], names)


class _Settings(NamedTuple):
    entropy: bool
    rank: bool
    forward: bool  # direction of the KL divergence
    dtype: torch.dtype  # of the matrix products
    elements: int
    change: LogitChange
    other_change: LogitChange


class _Side(NamedTuple):
    """A model's states, in the dtype of the products, and its head."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    change: LogitChange

    def raw(self, tile: slice) -> Tensor:
        """Output of the head for one tile, rounded as a linear layer rounds it.  -> [n tile]"""
        dtype = self.hidden.dtype
        bias = None if self.bias is None else self.bias[tile].to(dtype)
        return F.linear(self.hidden, self.weight[tile].to(dtype), bias)

    def logits(self, tile: slice) -> Tensor:
        """Logits of one tile.  -> [n tile] float32 or float64

        Where the device can, the sums of the product are not rounded to half precision before they are widened. Logits that
        the model changes are rounded as it rounds them.
        """
        if self.change.steps or not widens(self.hidden):
            return wide(self.change(self.raw(tile)))
        found = torch.mm(self.hidden, self.weight[tile].to(self.hidden.dtype).T, out_dtype=torch.float32)
        return found if self.bias is None else found.add_(self.bias[tile])


_widening: dict[str, bool] = {}  # by type of device, as it was found


def widens(states: Tensor) -> bool:
    """Whether the device of half-precision states multiplies them into float32; only CUDA does (torch 2.13)."""
    if states.dtype not in (torch.bfloat16, torch.float16):
        return False
    device = states.device.type
    if device not in _widening:
        few = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
        try:
            _widening[device] = torch.mm(few, few, out_dtype=torch.float32).dtype == torch.float32
        except (NotImplementedError, RuntimeError):
            _widening[device] = False
    return _widening[device]


class _Found(NamedTuple):
    """Sums over the vocabulary from the forward pass.  [n] each"""

    target: Tensor  # logit of the token
    own: Tensor  # logsumexp of the model's logits
    average: Tensor  # mean logit under the model
    others: Tensor  # logsumexp of the reference's logits
    divergence: Tensor  # mean difference of the logits, under the first distribution of the KL divergence


class _Pass(NamedTuple):
    """The backward pass: what the forward pass was given and found, and the gradients of the statistics, [n] each."""

    side: _Side
    other: _Side | None
    ids: Tensor
    found: _Found
    logp: Tensor
    entropy: Tensor | None  # None if it was not requested
    kl: Tensor | None
    settings: _Settings


class TiledSums:
    """Running sums over the vocabulary, relative to the largest logit so far (online softmax).  [n] each

    Args:
        like: Zeros of the shape and dtype of the sums.
    """

    def __init__(self, like: Tensor) -> None:
        self.peak = torch.full_like(like, -torch.inf)
        self.total, self.first = torch.zeros_like(like), torch.zeros_like(like)

    def add(self, logits: Tensor, values: Tensor | None) -> None:
        """Add a tile of logits, and the values to average under the distribution.  [n tile] each"""
        peak = torch.maximum(self.peak, logits.amax(-1))
        finite = torch.where(peak.isfinite(), peak, 0.0)
        share = (logits - finite[:, None]).exp_()
        before = (self.peak - finite).exp()
        self.total = self.total * before + share.sum(-1)
        if values is not None:
            # A probability of 0 contributes nothing, even if the value is not finite.
            so_far = torch.where(before > 0, self.first * before, 0.0)
            self.first = so_far + torch.where(share > 0, values * share, 0.0).sum(-1)
        self.peak = peak

    @property
    def logsumexp(self) -> Tensor:
        """Logsumexp of all logits."""
        return self.peak + self.total.log()

    @property
    def mean(self) -> Tensor:
        """Mean of the values under the distribution."""
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
        settings: _Settings,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.settings = settings
        given = (hidden, weight, bias, other_hidden, other_weight, other_bias)
        # The dtype of the products is explicit; autocast would round the sums too.
        with torch.autocast(hidden.device.type, enabled=False):
            side, other = _sides(settings, *given)
            found = _forward(side, other, ids, settings)
            rank = _above(side, found.target, settings.elements) if settings.rank else ids.detach()
        ctx.mark_non_differentiable(rank)
        ctx.save_for_backward(ids, *given, *found)
        target, own, average, others, divergence = found
        normalizers = own - others if settings.forward else others - own
        return target - own, own - average, divergence + normalizers, rank

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, grad_logp: Tensor, grad_entropy: Tensor, grad_kl: Tensor, grad_rank: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        settings, (ids, hidden, *given) = ctx.settings, ctx.saved_tensors[:7]
        with torch.autocast(hidden.device.type, enabled=False):
            side, other = _sides(settings, hidden, *given)
            wanted = tuple(bool(flag) for flag in ctx.needs_input_grad[:3])
            entropy = grad_entropy if settings.entropy else None
            kl = None if other is None else grad_kl
            found = _Found(*ctx.saved_tensors[7:])
            states, *weights = _backward(
                _Pass(side, other, ids, found, grad_logp, entropy, kl, settings), wanted
            )
        return (None if states is None else states.to(hidden.dtype), *weights, *(None,) * 5)


def _sides(
    settings: _Settings,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other_hidden: Tensor | None,
    other_weight: Tensor | None,
    other_bias: Tensor | None,
) -> tuple[_Side, _Side | None]:
    """The model, and the KL reference if there is one."""
    side = _Side(hidden.to(settings.dtype), weight, bias, settings.change)
    if other_hidden is None or other_weight is None:
        return side, None
    return side, _Side(other_hidden.to(settings.dtype), other_weight, other_bias, settings.other_change)


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
    """Number of logits that are larger than the token's own.  -> [n]"""
    count = torch.zeros_like(target)
    # The same tiles as in `_forward`: equal products round equally, so no token ranks above itself.
    for part in _tiles(len(side.weight), len(target), elements):
        count += (side.logits(part) > target[:, None]).sum(-1)
    return count


def _inside(ids: Tensor, part: slice) -> Tensor:
    return (ids >= part.start) & (ids < part.stop)


def _place(ids: Tensor, part: slice) -> Tensor:
    """Index of each token in a tile, clamped to the tile.  -> [n 1]"""
    return (ids - part.start).clamp(0, part.stop - part.start - 1)[:, None]


def _backward(given: _Pass, wanted: tuple[bool, ...]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of states, weight and bias."""
    side, dtype = given.side, given.side.hidden.dtype
    for_hidden = torch.zeros_like(wide(side.hidden)) if wanted[0] else None
    for_weight = torch.empty_like(side.weight) if wanted[1] else None
    for_bias = torch.empty_like(side.bias) if wanted[2] and side.bias is not None else None
    for part in _tiles(len(side.weight), len(given.ids), given.settings.elements):
        full = _logit_gradient(given, part)
        grad = full.to(dtype)
        if for_hidden is not None:
            weight = side.weight[part].to(dtype)
            for_hidden += torch.mm(grad, weight, out_dtype=torch.float32) if widens(grad) else grad @ weight
        if for_weight is not None:
            for_weight[part] = grad.T @ side.hidden
        if for_bias is not None:
            for_bias[part] = wide(full).sum(0)
    return for_hidden, for_weight, for_bias


def _logit_gradient(given: _Pass, part: slice) -> Tensor:
    """Gradient by the output of the head for one tile.  -> [n tile]"""
    side = given.side
    if not side.change.steps:
        return _by_logits(given, side.logits(part), part)
    raw = side.raw(part).requires_grad_()
    with torch.enable_grad():
        changed = wide(side.change(raw))
    return torch.autograd.grad(changed, raw, _by_logits(given, changed.detach(), part))[0]


def _by_logits(given: _Pass, logits: Tensor, part: slice) -> Tensor:
    """Gradient by the model's logits of one tile, which are overwritten.  -> [n tile]"""
    # The derivative of each statistic by a logit is its probability times a factor, plus 1 for logp at the token itself.
    if given.entropy is None and given.kl is None:
        gradient = logits.sub_(given.found.own[:, None]).exp_().mul_(-given.logp[:, None])
    else:
        gradient = _share_times_factors(given, logits, part)
    mine = torch.where(_inside(given.ids, part), given.logp, 0.0)
    return gradient.scatter_add_(1, _place(given.ids, part), mine[:, None])


def _share_times_factors(given: _Pass, logits: Tensor, part: slice) -> Tensor:
    """Probability times the factors of all statistics, if entropy or KL is requested.  -> [n tile]"""
    found = given.found
    logp = logits - found.own[:, None]
    share = logp.exp()
    factor = -given.logp[:, None]
    if given.entropy is not None:
        entropy = (found.own - found.average)[:, None]
        factor = factor - given.entropy[:, None] * (torch.where(share > 0, logp, 0.0) + entropy)
    if given.kl is None or given.other is None:
        return share * factor
    reference = given.other.logits(part)
    if given.settings.forward:
        theirs = (reference - found.others[:, None]).exp()
        return share * (factor + given.kl[:, None]) - theirs * given.kl[:, None]
    difference = torch.where(share > 0, logits - reference, 0.0)
    return share * (factor + given.kl[:, None] * (difference - found.divergence[:, None]))
