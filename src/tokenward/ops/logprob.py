# torch leaves parts of what is used here untyped.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
"""Per-token statistics of a language model head: log-probability, entropy, ranks and full-vocabulary KL."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class LogitStep(NamedTuple):
    """One thing that models do to each logit.

    Attributes:
        kind: ``times`` and ``over`` the number, or ``cap``: ``number * tanh(logit / number)``.
        number: As the model's config has it.
    """

    kind: Literal["times", "over", "cap"]
    number: float

    def __call__(self, logits: Tensor) -> Tensor:
        """The logits after it, in the number type that they have, as the model rounds them.  [n v] -> [n v]"""
        if self.kind == "times":
            return logits * self.number
        over = logits / self.number
        return over if self.kind == "over" else over.tanh() * self.number


class LogitChange(NamedTuple):
    """What a model does to its head's logits; nothing where there are no steps.

    Attributes:
        steps: One after another.
        widened: Whether the logits are put into float32 first. A sum over the vocabulary always is.
    """

    steps: tuple[LogitStep, ...] = ()
    widened: bool = False

    def __call__(self, logits: Tensor) -> Tensor:
        """The model's logits of its head's.  [n v] -> [n v]"""
        logits = wide(logits) if self.widened else logits
        for step in self.steps:
            logits = step(logits)
        return logits


UNCHANGED = LogitChange()
"""Most models hand their head's logits on."""


class LinearHead(NamedTuple):
    """The weights of a linear language model head.

    Attributes:
        weight: ``[v d]``.
        bias: ``[v]`` or None.
        change: What becomes of its logits.
    """

    weight: Tensor
    bias: Tensor | None = None
    change: LogitChange = UNCHANGED


class Reference(NamedTuple):
    """The model to which a KL divergence is taken; it gets no gradient.

    Attributes:
        hidden: ``[n d]``, its hidden states at the same positions.
        head: Its head, over the same vocabulary.
    """

    hidden: Tensor
    head: LinearHead


class TiledSums:
    """Sums over the vocabulary so far, each relative to the largest logit so far.  [n] each

    Args:
        like: Zeros of the shape and type of the sums.
    """

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
            so_far = torch.where(before > 0, self.first * before, 0.0)
            self.first = so_far + torch.where(share > 0, values * share, 0.0).sum(-1)
        self.peak = peak

    @property
    def logsumexp(self) -> Tensor:
        """Of all logits."""
        return self.peak + self.total.log()

    @property
    def mean(self) -> Tensor:
        """Of the values, under the distribution."""
        return self.first / self.total


Head = Callable[[Tensor], Tensor]
"""From hidden states ``[c d]`` to logits ``[c v]``."""

Direction = Literal["forward", "reverse"]
"""Of a KL divergence between a model and its reference: ``forward`` is KL(reference || model), ``reverse``
KL(model || reference)."""

CHUNK = 128
"""Rows whose logits exist at once."""


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


class Chunk(NamedTuple):
    """Some rows of logits, for the statistics that are made of them.

    Attributes:
        logits: ``[c v]``.
        ids: ``[c]``, the tokens.
        reference: ``[c v]``, logits of the reference; None where no divergence is asked for.
        direction: See :func:`kl_of`.
    """

    logits: Tensor
    ids: Tensor
    reference: Tensor | None = None
    direction: Direction = "reverse"

    def kl(self) -> Tensor:
        """KL divergence to the reference.  -> [c]"""
        assert self.reference is not None
        return kl_of(self.logits, self.reference, self.direction)


STATISTICS: dict[str, Callable[[Chunk], Tensor]] = {
    "entropy": lambda chunk: entropy_of(chunk.logits),
    "kl": Chunk.kl,
    "token_rank": lambda chunk: rank_of(chunk.logits, chunk.ids),
}
"""What a head can say of a token beside its log-probability, by name, one number each.

A new statistic needs an entry here and a field in :class:`tokenward.tokens.batches.Needs`.
"""

WITHOUT_GRADIENT = frozenset({"token_rank"})
"""Statistics that are counts."""


def statistics_of(chunk: Chunk, names: Sequence[str]) -> Tensor:
    """Log-probabilities, and the named statistics in their order, from logits.  -> [1 + k, c]"""
    return torch.stack([logprobs_of(chunk.logits, chunk.ids), *(STATISTICS[name](chunk) for name in names)])


def by_name(values: Iterable[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Statistics in the order of :func:`statistics_of` by their names, ``logp`` among them."""
    found = dict(zip(("logp", *names), values, strict=True))
    return {name: value.detach() if name in WITHOUT_GRADIENT else value for name, value in found.items()}


def chunked_logprobs(hidden: Tensor, ids: Tensor, head: Head, *, chunk: int = CHUNK) -> Tensor:
    """Log-probability of each token from the hidden state that predicts it.  [n d], [n] -> [n]

    See :func:`chunked_statistics`.
    """
    return chunked_statistics(hidden, ids, head, chunk=chunk)["logp"]


def chunked_statistics(
    hidden: Tensor,
    ids: Tensor,
    head: Head,
    names: Sequence[str] = (),
    *,
    reference: tuple[Tensor, Head] | None = None,
    direction: Direction = "reverse",
    chunk: int = CHUNK,
) -> dict[str, Tensor]:
    """``logp`` and the named statistics of each token in one pass of the head.  [n d], [n] -> [n] each

    Args:
        hidden: State at the position before each token.
        ids: The tokens.
        head: The language model head, called on ``chunk`` rows at a time.
        names: Of :data:`STATISTICS`; all come from the same logits.
        reference: Needed for ``kl``: the reference's states at the same positions, and its head.
        direction: See :func:`kl_of`.
        chunk: Rows whose logits exist at once; changes memory, not the result.
    """

    def piece(rows: Tensor, targets: Tensor, reference_rows: Tensor | None = None) -> Tensor:
        other = None if reference is None or reference_rows is None else reference[1](reference_rows)
        return statistics_of(Chunk(head(rows), targets, other, direction), names)

    rows = [hidden, ids] if reference is None else [hidden, ids, reference[0]]
    parts = zip(*(item.split(chunk) for item in rows), strict=True)
    return by_name(torch.cat([_recomputed(piece, *part) for part in parts], dim=1), names)


def wide(logits: Tensor) -> Tensor:
    """The same numbers in float32 or better: half precision is too coarse for a sum over a vocabulary."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _recomputed(piece: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return piece(*inputs)
    return checkpoint(piece, *inputs, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]
