# torch leaves parts of what is used here untyped.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
"""Per-token statistics of a language model head: log-probability, entropy, rank and full-vocabulary KL."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class LogitStep(NamedTuple):
    """An elementwise function that a model applies to its logits.

    Attributes:
        kind: ``times`` or ``over`` a number, or ``cap``: ``number * tanh(logit / number)``.
        number: As in the config of the model.
    """

    kind: Literal["times", "over", "cap"]
    number: float

    def __call__(self, logits: Tensor) -> Tensor:
        """Apply the step in the dtype of the logits, so that it rounds as the model does.  [n v] -> [n v]"""
        if self.kind == "times":
            return logits * self.number
        quotient = logits / self.number
        return quotient if self.kind == "over" else quotient.tanh() * self.number


class LogitChange(NamedTuple):
    """How a model transforms the output of its head into its logits.

    Attributes:
        steps: Applied one after another.
        widened: Whether the model casts the logits to float32 first.
    """

    steps: tuple[LogitStep, ...] = ()
    widened: bool = False

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits of the model from the output of its head.  [n v] -> [n v]"""
        logits = wide(logits) if self.widened else logits
        for step in self.steps:
            logits = step(logits)
        return logits


UNCHANGED = LogitChange()
"""For most models the output of the head is the logits."""


class LinearHead(NamedTuple):
    """Weights of a linear language model head."""

    weight: Tensor  # [v d]
    bias: Tensor | None = None  # [v]
    change: LogitChange = UNCHANGED


class Reference(NamedTuple):
    """The model that a KL divergence compares with; it gets no gradient."""

    hidden: Tensor  # [n d], its hidden states at the same positions
    head: LinearHead  # over the same vocabulary


Head = Callable[[Tensor], Tensor]
"""Maps hidden states ``[c d]`` to logits ``[c v]``."""

Direction = Literal["forward", "reverse"]
"""Of a KL divergence: ``forward`` is KL(reference || model), ``reverse`` is KL(model || reference)."""

CHUNK = 128
"""Rows whose logits exist at the same time."""


def wide(logits: Tensor) -> Tensor:
    """Cast to float32 unless float64. Half precision is too coarse for sums over a vocabulary."""
    return logits if logits.dtype == torch.float64 else logits.float()


def logprobs_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of each id under its row of logits, in float32 or float64.  [n v], [n] -> [n]"""
    logits = wide(logits)
    return logits.gather(-1, ids[:, None]).squeeze(-1) - logits.logsumexp(-1)


def entropy_of(logits: Tensor) -> Tensor:
    """Entropy of each row in nats.  [n v] -> [n]"""
    logp = wide(logits).log_softmax(-1)
    # A logit of -inf has probability 0; 0 * -inf would be NaN, in the value and in the gradient.
    return -(logp.exp() * torch.where(logp > -torch.inf, logp, 0.0)).sum(-1)


def rank_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Number of tokens that are strictly more probable than each id, without gradient.  [n v], [n] -> [n]

    In the dtype of :func:`wide` logits; float32 holds integers up to 16 million exactly.
    """
    logits = wide(logits.detach())
    return (logits > logits.gather(-1, ids[:, None])).sum(-1).to(logits.dtype)


def kl_of(logits: Tensor, reference_logits: Tensor, direction: Direction = "reverse") -> Tensor:
    """KL divergence over the full vocabulary, in nats per row.  [n v], [n v] -> [n]"""
    logp, other = wide(logits).log_softmax(-1), wide(reference_logits).log_softmax(-1)
    if direction == "forward":
        logp, other = other, logp
    share = logp.exp()
    # A probability of 0, also one that underflows, contributes nothing even if the other log-probability is -inf.
    return (share * torch.where(share > 0, logp - other, 0.0)).sum(-1)


class Chunk(NamedTuple):
    """Rows of logits, and what the statistics of a row depend on."""

    logits: Tensor  # [c v]
    ids: Tensor  # [c]
    reference: Tensor | None = None  # [c v], logits of the KL reference
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
"""Statistics of a token besides its log-probability, one number each, by name.

A new statistic needs an entry here and a field in :class:`tokenward.tokens.batches.Needs`.
"""

WITHOUT_GRADIENT = frozenset({"token_rank"})
"""Statistics that are counts."""


def statistics_of(chunk: Chunk, names: Sequence[str]) -> Tensor:
    """Log-probabilities, then the named statistics in their order.  -> [1 + k, c]"""
    return torch.stack([logprobs_of(chunk.logits, chunk.ids), *(STATISTICS[name](chunk) for name in names)])


def by_name(values: Iterable[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """``logp`` and the named statistics as a dict, from the order of :func:`statistics_of`."""
    found = dict(zip(("logp", *names), values, strict=True))
    return {name: value.detach() if name in WITHOUT_GRADIENT else value for name, value in found.items()}


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
    """``logp`` and the named :data:`STATISTICS` of each token from one pass of the head.  [n d], [n] -> [n] each

    ``hidden`` is the state before each token. The head runs on ``chunk`` rows at a time, which affects memory, not the result.
    ``kl`` needs ``reference``: the states of the reference at the same positions, and its head.
    """

    def compute(rows: Tensor, targets: Tensor, reference_rows: Tensor | None = None) -> Tensor:
        other = None if reference is None or reference_rows is None else reference[1](reference_rows)
        return statistics_of(Chunk(head(rows), targets, other, direction), names)

    def recomputed(*part: Tensor) -> Tensor:
        # Checkpointing drops the logits of a chunk after its forward pass; the backward pass makes them again.
        if not torch.is_grad_enabled():
            return compute(*part)
        return checkpoint(compute, *part, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]

    rows = [hidden, ids] if reference is None else [hidden, ids, reference[0]]
    parts = zip(*(item.split(chunk) for item in rows), strict=True)
    return by_name(torch.cat([recomputed(*part) for part in parts], dim=1), names)
