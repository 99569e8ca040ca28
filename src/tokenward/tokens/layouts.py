"""Layouts of comparisons as model inputs, and the position of each response token in them.

``shared``: all comparisons in one row. The responses of a comparison branch off its prompt, which is computed once.
``separate``: a padded row of prompt and response for each response.
``encoder_decoder``: the prompt for the encoder, the response for the decoder, padded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import takewhile
from typing import Any, Self

import torch
from torch import Tensor

from tokenward.tokens.rows import Layout, TokenRow
from tokenward.tokens.trees import Tree, tree_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInputs:
    """The inputs of a model for a batch, and the position of each response token in them."""

    input_ids: Tensor  # [rows t], padded on the right; a single row without padding in the shared layout
    position_ids: Tensor  # [rows t]
    attention_mask: Tensor  # [rows t]; a placeholder if there is a tree
    # [n], index into the flattened rows x t of the position whose output predicts the token.
    predicted_from: Tensor
    # [n], index into the flattened rows x t of the position that reads the token. For tokens that were not
    # laid out it is past the end.
    placed_at: Tensor
    tree: Tree | None = None  # attention structure of a packed row, or None
    # [rows t], inputs of the decoder if the model has an encoder, or None. The two indices above are then those
    # of the decoder.
    decoder_ids: Tensor | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The inputs on another device."""
        return replace(self, **on_device(self, device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The inputs in page-locked memory."""
        return replace(self, **pinned(self))


def on_device(item: Any, device: torch.device | str, *, non_blocking: bool) -> dict[str, Any]:
    """The fields of a dataclass that are tensors or trees, on another device."""
    values = {part.name: getattr(item, part.name) for part in fields(item)}
    return {
        name: value.to(device, non_blocking=non_blocking)
        for name, value in values.items()
        if isinstance(value, Tensor | Tree)
    }


def pinned(item: Any) -> dict[str, Any]:
    """The fields of a dataclass that are tensors or trees, in page-locked memory, which a GPU copies without the host."""
    values = (getattr(item, part.name) for part in fields(item))
    return {
        part.name: value.pin_memory()
        for part, value in zip(fields(item), values, strict=True)
        if isinstance(value, Tensor | Tree)
    }


def predicting_positions(read_at: Tensor, before: int) -> Tensor:
    """The position whose output predicts each token of a response. The only next-token shift.  [n] -> [n]

    Args:
        read_at: Position that reads each token.
        before: Position of the last prompt token.
    """
    return torch.cat((read_at.new_tensor([before]), read_at))[: len(read_at)]


def lay_out(
    encoded: Sequence[TokenRow],
    read: Sequence[Sequence[int]],
    *,
    layout: Layout,
    pad_id: int,
    start_id: int | None,
) -> ModelInputs:
    """Lay comparisons out as model inputs.

    Args:
        encoded: The comparisons.
        read: For each comparison and response, how many of its first tokens the model reads, inserts included.
        layout: See the module.
        pad_id: Padding token.
        start_id: First token of a decoder.
    """
    if layout == "shared":
        return _packed(encoded, read)
    if layout == "separate":
        return _separate(encoded, read, pad_id)
    if start_id is None:
        raise ValueError("the encoder-decoder layout needs start_id, the first token of the decoder")
    return _encoder_decoder(encoded, pad_id, start_id)


class _Places:
    """Collects the positions of the response tokens, one response after another.

    ``outside`` is an index past the end, so that asking for a token that was not laid out is an error.
    """

    def __init__(self, outside: int) -> None:
        self.outside = outside
        self.predicted: list[Tensor] = []
        self.placed: list[Tensor] = []

    def add(self, read_at: Tensor, *, before: int, own: Sequence[int], length: int) -> None:
        """Adds a response of ``length`` tokens, of which ``own`` are the assistant's and the first are read at ``read_at``."""
        placed = torch.cat((read_at, read_at.new_full((length - len(read_at),), self.outside)))
        predicted = predicting_positions(placed, before)
        if len(own) < length:
            chosen = torch.tensor(own, dtype=torch.long)
            placed, predicted = placed[chosen], predicted[chosen]
        self.placed.append(placed)
        self.predicted.append(predicted)

    def tensors(self) -> dict[str, Any]:
        return {"predicted_from": torch.cat(self.predicted), "placed_at": torch.cat(self.placed)}


def _packed(encoded: Sequence[TokenRow], read: Sequence[Sequence[int]]) -> ModelInputs:
    total = sum(len(item.prompt) + sum(counts) for item, counts in zip(encoded, read, strict=True))
    ids, positions, shapes, places = list[int](), list[int](), list[tuple[int, list[int]]](), _Places(total)
    for item, counts in zip(encoded, read, strict=True):
        start, prompt = len(ids), len(item.prompt)
        whole = [item.whole(place) for place in range(len(item.responses))]
        common = _common([response for response, _ in whole], counts)
        ids += item.prompt + common
        positions += range(prompt + len(common))
        branches = [max(count - len(common), 0) for count in counts]
        for (response, own), count, branch in zip(whole, counts, branches, strict=True):
            trunk = torch.arange(start + prompt, start + prompt + min(count, len(common)))
            read_at = torch.cat((trunk, torch.arange(len(ids), len(ids) + branch)))
            places.add(read_at, before=start + prompt - 1, own=own, length=len(response))
            ids += response[len(common) : len(common) + branch]
            positions += range(prompt + len(common), prompt + len(common) + branch)
        shapes.append((prompt + len(common), branches))
    return ModelInputs(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        # transformers passes a mask of four dimensions on unchanged, instead of building its own.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),
        tree=tree_of(shapes),
        **places.tensors(),
    )


def _common(responses: Sequence[list[int]], counts: Sequence[int]) -> list[int]:
    """The common first tokens of all responses, as far as any of them is read."""
    if len(responses) < 2:
        return []
    same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*responses, strict=False))
    return [tokens[0] for tokens in same][: max(counts)]


def _padded(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])


def _places_in_rows(
    responses: Sequence[tuple[Sequence[int], Sequence[int], int]], heads: Sequence[int], width: int
) -> dict[str, Any]:
    """Positions in padded rows, given ids, own positions and number of ids read of each response, and what is before it."""
    places = _Places(len(responses) * width)
    for number, ((ids, own, count), head) in enumerate(zip(responses, heads, strict=True)):
        start = number * width + head
        places.add(torch.arange(start, start + count), before=start - 1, own=own, length=len(ids))
    return places.tensors()


def _separate(encoded: Sequence[TokenRow], read: Sequence[Sequence[int]], pad_id: int) -> ModelInputs:
    prompts = [item.prompt for item in encoded for _ in item.responses]
    responses = [
        (*item.whole(place), count)
        for item, counts in zip(encoded, read, strict=True)
        for place, count in enumerate(counts)
    ]
    rows = [prompt + ids[:count] for prompt, (ids, _, count) in zip(prompts, responses, strict=True)]
    width = max(map(len, rows))
    return ModelInputs(
        input_ids=_padded(rows, pad_id),
        position_ids=torch.arange(width).repeat(len(rows), 1),
        attention_mask=_padded([[1] * len(row) for row in rows], 0),
        **_places_in_rows(responses, [len(prompt) for prompt in prompts], width),
    )


def _encoder_decoder(encoded: Sequence[TokenRow], pad_id: int, start_id: int) -> ModelInputs:
    """The decoder reads ``[start | response]`` completely, because a reward is read after its token.

    Policies use the same layout, so a reward model is used as it was trained.
    """
    prompts = [item.prompt for item in encoded for _ in item.responses]
    responses = [(ids, range(len(ids)), len(ids)) for item in encoded for ids in item.responses]
    rows = [[start_id, *ids] for ids, _, _ in responses]
    width = max(map(len, rows))
    return ModelInputs(
        input_ids=_padded(prompts, pad_id),
        position_ids=torch.arange(width).repeat(len(rows), 1),
        attention_mask=_padded([[1] * len(prompt) for prompt in prompts], 0),
        decoder_ids=_padded(rows, pad_id),
        **_places_in_rows(responses, [1] * len(rows), width),
    )
