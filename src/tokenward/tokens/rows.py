"""Rows of a batch: how comparisons are laid out for the model, and where each token is predicted.

In a shared row the prompt stands once, ``[prompt | response 1 | ... | response K]``; positions
restart after the prompt and each response sees the prompt and itself only. In separate rows each
response has its own ``[prompt | response]``. An encoder-decoder reads the prompt in its encoder and
``[start | response]`` in its decoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, Self

import torch
from torch import Tensor

from tokenward.tokens.encode import Encoded

Layout = Literal["shared", "separate", "encoder_decoder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """A batch as the model takes it, and its response tokens laid end to end.

    Attributes:
        input_ids: ``[rows t]``, padded on the right.
        position_ids: ``[rows t]``.
        attention_mask: ``[rows 1 t t]`` bool for shared rows, ``[rows t]`` for the others.
        decoder_ids: ``[rows t]`` or None; what the decoder reads, where the model has an encoder. The places
            below are then those of the decoder.
        predicted_from: ``[n]``, index into the flattened ``rows x t`` of the position whose output
            predicts the token.
        placed_at: ``[n]``, index into the flattened ``rows x t`` of the position that reads the token.
        ids: ``[n]``, the response tokens.
        response: ``[n]``, which response owns the token.
        comparison: ``[r]``, which comparison owns the response.
        rank: ``[r]``, 0 is the best.
        weights: ``[n]``, what each token counts; 1 where nothing was said.
        kept: ``[m]``, indices of the tokens whose weight is not zero.
        reference_logp: ``[n]`` or None, log-probability under the reference.
        scores: ``[n]`` or None, for selections made batch by batch and for objectives that take a reward.
        segment: ``[n]`` or None, which segment (word, sentence, span) owns the token; segments are numbered
            in order and each lies within one response.
        entropy: ``[n]`` or None, entropy in nats of the policy's whole distribution where the token was
            predicted, with its gradient; set for objectives that say ``needs_entropy``.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    predicted_from: Tensor
    placed_at: Tensor
    ids: Tensor
    response: Tensor
    comparison: Tensor
    rank: Tensor
    weights: Tensor
    kept: Tensor
    reference_logp: Tensor | None = None
    scores: Tensor | None = None
    segment: Tensor | None = None
    entropy: Tensor | None = None
    decoder_ids: Tensor | None = None

    @property
    def comparisons(self) -> int:
        """Number of comparisons."""
        return int(self.comparison[-1]) + 1 if len(self.comparison) else 0

    @property
    def responses(self) -> int:
        """Number of responses."""
        return len(self.comparison)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same batch on another device."""
        moved = {
            item.name: value.to(device, non_blocking=non_blocking)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """An encoded comparison with what is known of its tokens, each list one entry per response.

    Attributes:
        encoded: The ids.
        weights: ``[len]`` per response, or None for 1 everywhere.
        reference_logp: ``[len]`` per response, or None.
        scores: ``[len]`` per response, or None.
        segments: ``[len]`` whole numbers per response, equal within a segment and rising, or None.
    """

    encoded: Encoded
    weights: Sequence[Tensor] | None = None
    reference_logp: Sequence[Tensor] | None = None
    scores: Sequence[Tensor] | None = None
    segments: Sequence[Tensor] | None = None

    def shape(self, layout: Layout) -> tuple[int, int]:
        """Rows that this comparison takes in a batch, and the width of the widest."""
        if layout == "shared":
            return 1, self.encoded.length
        if layout == "encoder_decoder":
            longest = max(map(len, self.encoded.responses))
            return len(self.encoded.responses), len(self.encoded.prompt) + longest + 1
        return len(self.encoded.responses), len(self.encoded.prompt) + max(map(len, self.encoded.responses))


def predicting_positions(start: int, length: int, before: int) -> Tensor:
    """Position whose output predicts each token of a response: the one place of the next-token shift.

    Args:
        start: Position of the response's first token in its row.
        length: Number of its tokens.
        before: Position of the last prompt token.
    """
    positions = torch.arange(start - 1, start + length - 1)
    positions[:1] = before
    return positions


def collate(
    rows: Sequence[TokenRow], *, layout: Layout, pad_id: int, start_id: int | None = None
) -> TokenBatch:
    """Lay comparisons out as one batch.

    Args:
        rows: The comparisons.
        layout: See the module.
        pad_id: Fills rows.
        start_id: What a decoder begins with, for ``layout="encoder_decoder"``.
    """
    encoded = [row.encoded for row in rows]
    lengths = torch.tensor([len(ids) for item in encoded for ids in item.responses])
    sizes = torch.tensor([len(item.responses) for item in encoded])
    total = int(lengths.sum())
    known = _flat([row.weights for row in rows], total)
    weights = torch.ones(total) if known is None else known
    return TokenBatch(
        **_laid_out(encoded, layout, pad_id, start_id),
        ids=torch.tensor([token for item in encoded for ids in item.responses for token in ids]),
        response=torch.repeat_interleave(torch.arange(len(lengths)), lengths),
        comparison=torch.repeat_interleave(torch.arange(len(encoded)), sizes),
        rank=torch.tensor([rank for item in encoded for rank in item.comparison.ranks]),
        weights=weights,
        kept=weights.nonzero().squeeze(-1),
        reference_logp=_flat([row.reference_logp for row in rows], total),
        scores=_flat([row.scores for row in rows], total),
        segment=_segments([row.segments for row in rows]),
    )


def _laid_out(
    encoded: Sequence[Encoded], layout: Layout, pad_id: int, start_id: int | None
) -> dict[str, Tensor]:
    if layout == "shared":
        return _shared_rows(encoded, pad_id)
    if layout == "separate":
        return _separate_rows(encoded, pad_id)
    if start_id is None:
        raise ValueError("an encoder-decoder's rows need the id that its decoder starts with")
    return _encoder_decoder_rows(encoded, pad_id, start_id)


def _segments(values: Sequence[Sequence[Tensor] | None]) -> Tensor | None:
    """Segments of all responses numbered one after another."""
    known = [part for item in values if item is not None for part in item]
    if not known:
        return None
    if any(item is None for item in values):
        raise ValueError("some rows have segments, some have none")
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
            f"{len(flat)} token values for {total} response tokens: some rows have values, some have none"
        )
    return flat


def _padded(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])


def _shared_rows(encoded: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    ids, positions, owners, predicted, placed = [], [], [], [], []
    width = max(item.length for item in encoded)
    for number, item in enumerate(encoded):
        row, place, owner = list(item.prompt), list(range(len(item.prompt))), [0] * len(item.prompt)
        for index, response in enumerate(item.responses, start=1):
            shift = predicting_positions(len(row), len(response), len(item.prompt) - 1)
            predicted.append(shift + number * width)
            placed.append(torch.arange(len(row), len(row) + len(response)) + number * width)
            row += response
            place += range(len(item.prompt), len(item.prompt) + len(response))
            owner += [index] * len(response)
        ids.append(row)
        positions.append(place)
        owners.append(owner)
    return {
        "input_ids": _padded(ids, pad_id),
        "position_ids": _padded(positions, 0),
        "attention_mask": shared_mask(_padded(owners, -1)),
        "predicted_from": torch.cat(predicted),
        "placed_at": torch.cat(placed),
    }


def shared_mask(owner: Tensor) -> Tensor:
    """Who sees whom in shared rows: causal, the prompt (owner 0) and one's own response only.  [b t] -> [b 1 t t]

    Padding (owner -1) sees itself, because a row of the softmax must not be empty, and nobody sees it.
    """
    query, key = owner[:, :, None], owner[:, None, :]
    length = owner.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=owner.device).tril()
    visible = ((key == 0) | (key == query)) & (query >= 0) & causal
    itself = torch.eye(length, dtype=torch.bool, device=owner.device)
    return (visible | itself)[:, None]


def _separate_rows(encoded: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    pairs = [(item.prompt, response) for item in encoded for response in item.responses]
    rows = [prompt + response for prompt, response in pairs]
    width = max(map(len, rows))
    predicted = [
        predicting_positions(len(prompt), len(response), len(prompt) - 1) + number * width
        for number, (prompt, response) in enumerate(pairs)
    ]
    placed = [
        torch.arange(len(prompt), len(prompt) + len(response)) + number * width
        for number, (prompt, response) in enumerate(pairs)
    ]
    return {
        "input_ids": _padded(rows, pad_id),
        "position_ids": torch.arange(width).repeat(len(rows), 1),
        "attention_mask": _padded([[1] * len(row) for row in rows], 0),
        "predicted_from": torch.cat(predicted),
        "placed_at": torch.cat(placed),
    }


def _encoder_decoder_rows(encoded: Sequence[Encoded], pad_id: int, start_id: int) -> dict[str, Tensor]:
    """The decoder reads ``[start | response]`` whole, its last token too: a reward is read after its token.

    Reward model and policy share this one layout, so a reward sees in use what it saw in training.
    """
    pairs = [(item.prompt, response) for item in encoded for response in item.responses]
    rows = [[start_id, *response] for _, response in pairs]
    width = max(map(len, rows))
    places = [torch.arange(1, len(row)) + number * width for number, row in enumerate(rows)]
    predicted = [
        predicting_positions(1, len(response), 0) + number * width
        for number, (_, response) in enumerate(pairs)
    ]
    return {
        "input_ids": _padded([prompt for prompt, _ in pairs], pad_id),
        "position_ids": torch.arange(width).repeat(len(rows), 1),
        "attention_mask": _padded([[1] * len(prompt) for prompt, _ in pairs], 0),
        "decoder_ids": _padded(rows, pad_id),
        "predicted_from": torch.cat(predicted),
        "placed_at": torch.cat(places),
    }
