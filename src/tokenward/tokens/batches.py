"""Batches of comparisons as model inputs, and what an objective needs of a batch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.ops.logprob import STATISTICS, Direction
from tokenward.tokens.layouts import ModelInputs, lay_out, on_device, pinned
from tokenward.tokens.rows import Layout, TokenRow

Unpaired = Literal["good", "all"]
"""Which comparisons of a single response an objective trains on: those with a good response, or all."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Needs:
    """What an objective needs. Two of them are merged with ``|``.

    Attributes:
        reference: ``batch.reference_logp [n]``, the stored log-probabilities of the reference model.
        scores: ``batch.scores [n]``, the stored scores or rewards of the tokens.
        entropy: ``batch.statistics["entropy"] [n]``, nats: the entropy of the policy's distribution that predicts the
            token, with gradient.
        token_rank: ``batch.statistics["token_rank"] [n]``: the number of tokens that the policy found more probable.
        kl: ``batch.statistics["kl"] [n]``, nats: the KL divergence over the whole vocabulary, with gradient.
            ``"forward"`` is KL(reference || policy), ``"reverse"`` is KL(policy || reference).
        states: ``batch.statistics["states"] [n d]``: the policy's last hidden state that predicts the token, with
            gradient.
        reference_layers: ``batch.statistics["reference_layers"] [n L d]``: the output of each layer of the frozen
            reference model at that position.
        pairwise: Every comparison has exactly two responses, the better one first.
        own_denominator: Its :class:`tokenward.objectives.base.Losses` have a ``denominator``.
        unpaired: Comparisons with a single response of rank 0 (good) or 1 (bad): ``"all"``, or ``"good"`` if a bad one
            alone teaches nothing. None refuses them.
        draws: A random number of the step, ``batch.values[DRAW]``, so that what it draws does not depend on how the step
            is cut into batches.

    Raises:
        UserError: ``kl`` or ``unpaired`` has an unknown value.
    """

    reference: bool = False
    scores: bool = False
    entropy: bool = False
    token_rank: bool = False
    kl: Direction | None = None
    states: bool = False
    reference_layers: bool = False
    pairwise: bool = False
    own_denominator: bool = False
    unpaired: Unpaired | None = None
    draws: bool = False

    def __post_init__(self) -> None:
        if self.kl not in (None, "forward", "reverse"):
            raise UserError(
                f"Needs has kl={self.kl!r}. Use forward for KL(reference || policy), or reverse for KL(policy || reference).",
                code="unknown-value",
            )
        if self.unpaired not in (None, "good", "all"):
            raise UserError(
                f"Needs has unpaired={self.unpaired!r}. Use all, good for rows with a good response, or None.",
                code="unknown-value",
            )

    def __repr__(self) -> str:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return f"Needs({', '.join(f'{name}={value!r}' for name, value in values.items() if value)})"

    def __or__(self, other: "Needs") -> "Needs":
        """The needs of two objectives together.

        Comparisons with a single response are accepted if both train on them; a bad one if one of them learns from it.

        Raises:
            UserError: They need KL divergences in different directions, and a forward pass computes only one.
        """
        if self.kl and other.kl and self.kl != other.kl:
            raise UserError(
                "one objective needs the forward KL divergence and another the reverse one, but a forward pass computes "
                "only one of them. Use the same direction for both.",
                code="conflicting-needs",
            )
        both: dict[str, Any] = {
            item.name: getattr(self, item.name) or getattr(other, item.name) for item in fields(self)
        }
        unpaired: list[Unpaired | None] = [self.unpaired, other.unpaired]
        both["unpaired"] = None if None in unpaired else "all" if "all" in unpaired else "good"
        return Needs(**both)

    @property
    def of_head(self) -> tuple[str, ...]:
        """Names of the statistics that the head of the model computes."""
        return tuple(name for name in STATISTICS if getattr(self, name))

    @property
    def frozen_reference(self) -> bool:
        """Whether the reference model itself is needed during training, not only its stored values."""
        return self.kl is not None or self.reference_layers


NOTHING = Needs()
"""Log-probabilities alone."""


class BatchSizes(NamedTuple):
    """Numbers of a batch that the host knows, so that it need not ask a GPU for them.

    Attributes:
        comparisons: Number of comparisons.
        longest_list: Largest number of responses of a comparison.
        ties: Whether responses of one comparison have the same rank.
        segments: Number of segments, 0 without.
    """

    comparisons: int
    longest_list: int
    ties: bool
    segments: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """The response tokens of some comparisons, concatenated. This is the input of an objective.

    Attributes:
        ids: ``[n]``, the tokens.
        response: ``[n]``, the response of each token.
        comparison: ``[r]``, the comparison of each response.
        rank: ``[r]``, 0 is the best.
        weights: ``[n]``, the weight of each token; 1 if none was set.
        kept: ``[m]``, indices of the tokens whose weight is not zero.
        eos: ``[n]`` bool, whether the token is an eos token rather than text.
        reference_logp: ``[n]`` or None, log-probability under the reference model.
        scores: ``[n]`` or None, for online selections and for objectives that take a reward.
        segment: ``[n]`` or None, the segment (word, sentence, span) of each token. Segments are numbered in order, and
            each is within one response.
        values: More stored values by name, ``[n]`` each, for scores that are computed online.
        statistics: Results of the forward pass other than log-probabilities, by the field names of :class:`Needs`; only
            those that the objective needs.
        sizes: What the host knows of the batch; None to read it from the tensors, for which the host waits for a GPU.
    """

    ids: Tensor
    response: Tensor
    comparison: Tensor
    rank: Tensor
    weights: Tensor
    kept: Tensor
    eos: Tensor
    reference_logp: Tensor | None = None
    scores: Tensor | None = None
    segment: Tensor | None = None
    values: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    statistics: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    sizes: BatchSizes | None = None

    @property
    def comparisons(self) -> int:
        """Number of comparisons."""
        if self.sizes is not None:
            return self.sizes.comparisons
        return int(self.comparison[-1]) + 1 if len(self.comparison) else 0

    @property
    def responses(self) -> int:
        """Number of responses."""
        return len(self.comparison)

    def weighted(self, weights: Tensor) -> Self:
        """The tokens with other weights.  [n]"""
        return replace(self, weights=weights, kept=weights.nonzero().squeeze(-1))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The tokens on another device."""
        values, statistics = (
            {name: value.to(device, non_blocking=non_blocking) for name, value in named.items()}
            for named in (self.values, self.statistics)
        )
        own = on_device(self, device, non_blocking=non_blocking)
        return replace(self, **own, values=values, statistics=statistics)

    def pin_memory(self) -> Self:
        """The tokens in page-locked memory."""
        values, statistics = (
            {name: value.pin_memory() for name, value in named.items()}
            for named in (self.values, self.statistics)
        )
        return replace(self, **pinned(self), values=values, statistics=statistics)


@dataclass(frozen=True, slots=True)
class Batch:
    """Comparisons that are computed together.

    Attributes:
        inputs: Inputs of the model.
        tokens: Input of an objective.
    """

    inputs: ModelInputs
    tokens: TokenBatch

    def with_value(self, name: str, value: Tensor) -> Self:
        """The batch with one more value of its tokens.  [n]"""
        tokens = replace(self.tokens, values={**self.tokens.values, name: value})
        return replace(self, tokens=tokens)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The batch on another device."""
        inputs = self.inputs.to(device, non_blocking=non_blocking)
        return replace(self, inputs=inputs, tokens=self.tokens.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The batch in page-locked memory."""
        return replace(self, inputs=self.inputs.pin_memory(), tokens=self.tokens.pin_memory())


def collate(
    rows: Sequence[TokenRow],
    *,
    layout: Layout,
    pad_id: int,
    start_id: int | None = None,
    whole: bool = True,
) -> Batch:
    """Lay comparisons out as one batch.

    Args:
        rows: The comparisons.
        layout: See :mod:`tokenward.tokens.layouts`.
        pad_id: Padding token.
        start_id: First token of a decoder, for ``layout="encoder_decoder"``.
        whole: Lay out each response completely. Otherwise only the tokens before the last one with a weight are laid out,
            because no log-probability that counts depends on the others.
    """
    lengths = torch.tensor([len(ids) for item in rows for ids in item.responses])
    sizes = torch.tensor([len(item.responses) for item in rows])
    total = int(lengths.sum())
    known = _flat([row.weights for row in rows], total)
    weights = torch.ones(total) if known is None else known
    read = [[row.size(i) if whole else _needed(row, i) for i in range(len(row.responses))] for row in rows]
    inputs = lay_out(rows, read, layout=layout, pad_id=pad_id, start_id=start_id)
    segment = _segments([row.segments for row in rows])
    tokens = TokenBatch(
        ids=torch.tensor([token for item in rows for ids in item.responses for token in ids]),
        response=torch.repeat_interleave(torch.arange(len(lengths)), lengths),
        comparison=torch.repeat_interleave(torch.arange(len(rows)), sizes),
        rank=torch.tensor([rank for item in rows for rank in item.comparison.ranks]),
        weights=weights,
        kept=weights.nonzero().squeeze(-1),
        eos=_eos(rows, lengths),
        reference_logp=_flat([row.reference_logp for row in rows], total),
        scores=_flat([row.scores for row in rows], total),
        segment=segment,
        values=_values(rows, total),
        sizes=_sizes(rows, segment),
    )
    return Batch(inputs, tokens)


def _sizes(rows: Sequence[TokenRow], segment: Tensor | None) -> BatchSizes:
    ranks = [row.comparison.ranks for row in rows]
    return BatchSizes(
        comparisons=len(rows),
        longest_list=max(map(len, ranks), default=0),
        ties=any(len(set(own)) < len(own) for own in ranks),
        segments=0 if segment is None or not len(segment) else int(segment[-1]) + 1,
    )


def _eos(rows: Sequence[TokenRow], lengths: Tensor) -> Tensor:
    counts = torch.tensor([count for item in rows for count in item.eos])
    place = torch.arange(int(lengths.sum()))
    return place >= torch.repeat_interleave(lengths.cumsum(0) - counts, lengths)


def _values(rows: Sequence[TokenRow], total: int) -> dict[str, Tensor]:
    names = sorted({name for row in rows for name in row.values})
    found = {name: _flat([row.values.get(name) for row in rows], total) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _needed(row: TokenRow, place: int) -> int:
    """Number of tokens of a response that must be read: those before the last one with a weight."""
    last = len(row.responses[place]) - 1
    if row.weights is not None:
        kept = row.weights[place].nonzero()
        last = int(kept[-1]) if len(kept) else -1
    if last < 0:
        return 0
    return last + sum(len(insert.ids) for insert in row.inserts(place) if insert.before <= last)


def _segments(values: Sequence[Sequence[Tensor] | None]) -> Tensor | None:
    """The segments of all responses, numbered consecutively."""
    known = [part for item in values if item is not None for part in item]
    if not known:
        return None
    if any(item is None for item in values):
        raise ValueError("some rows have segments and some have none")
    parts, before = [], 0
    for part in known:
        numbers = torch.unique_consecutive(part, return_inverse=True)[1]
        parts.append(numbers + before)
        before += int(numbers[-1]) + 1 if len(numbers) else 0
    return torch.cat(parts)


def _flat(values: Sequence[Sequence[Tensor] | None], total: int) -> Tensor | None:
    known = [part for item in values if item is not None for part in item]
    if not known:
        return None
    flat = torch.cat(known).float()
    if len(flat) != total:
        raise ValueError(
            f"{len(flat)} token values for {total} response tokens: some rows have values and some have none"
        )
    return flat


def budgeted(rows: Sequence[TokenRow], *, layout: Layout, tokens: int) -> Iterator[list[int]]:
    """Groups of comparisons of similar length, as indices, with at most ``tokens`` tokens each, padding included.

    A comparison that is longer than the budget gets a group of its own. The longest come first, so the first group shows
    whether the memory is sufficient.
    """
    shapes = [row.shape(layout) for row in rows]
    group: list[int] = []
    taken, width = 0, 0
    for index in sorted(range(len(rows)), key=lambda index: -shapes[index][1]):
        height, own_width = shapes[index]
        # In sorted order the first comparison of a padded group is the longest, and all others are padded to it.
        if not group or layout == "shared":
            width = own_width
        if group and taken + height * width > tokens:
            yield group
            group, taken, width = [], 0, own_width
        taken += height * width
        group.append(index)
    if group:
        yield group
