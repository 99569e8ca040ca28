"""How comparisons are laid out for a model, and where in the rows each response token is.

``shared``: all comparisons in one row without padding, ``[trunk | rest of response 1 | ... | rest of
response K]`` one after another. The trunk is the prompt and what all responses of it begin with; it is
computed once. Positions go on from the trunk in each response, which sees the trunk and itself only.
``separate``: a padded row ``[prompt | response]`` for each response. ``encoder_decoder``: the prompt in the
encoder's row, ``[start | response]`` in the decoder's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import takewhile
from typing import Any, Self

import torch
from torch import Tensor

from tokenward.tokens.rows import Layout, TokenRow
from tokenward.tokens.tree import Tree, tree_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInputs:
    """What the model reads of a batch, and where each response token is in it.

    Attributes:
        input_ids: ``[rows t]``, padded on the right; one row without padding in the shared layout.
        position_ids: ``[rows t]``.
        attention_mask: ``[rows t]``; one value that says nothing where there is a tree.
        predicted_from: ``[n]``, index into the flattened ``rows x t`` of the position whose output predicts the token.
        placed_at: ``[n]``, index into the flattened ``rows x t`` of the position that reads the token. A place that
            was not laid out is past the end.
        tree: Who sees whom in a packed row, or None.
        decoder_ids: ``[rows t]`` or None; what the decoder reads, where the model has an encoder. The places
            above are then those of the decoder.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    predicted_from: Tensor
    placed_at: Tensor
    tree: Tree | None = None
    decoder_ids: Tensor | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same inputs on another device."""
        return replace(self, **moved(self, device, non_blocking=non_blocking))


def moved(item: Any, device: torch.device | str, *, non_blocking: bool) -> dict[str, Any]:
    """The fields of a dataclass that are tensors or trees, on another device."""
    values = {part.name: getattr(item, part.name) for part in fields(item)}
    return {
        name: value.to(device, non_blocking=non_blocking)
        for name, value in values.items()
        if isinstance(value, Tensor | Tree)
    }


def predicting_positions(read_at: Tensor, before: int) -> Tensor:
    """Position whose output predicts each token of a response: the one place of the next-token shift.  [n] -> [n]

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
    """Lay comparisons out as a model takes them.

    Args:
        encoded: The comparisons.
        read: Per comparison and response, how many of its first tokens the model reads, those of others among them.
        layout: See the module.
        pad_id: Fills rows.
        start_id: What a decoder begins with.
    """
    if layout == "shared":
        return _packed(encoded, read)
    if layout == "separate":
        return _separate(encoded, read, pad_id)
    if start_id is None:
        raise ValueError("an encoder-decoder's rows need the id that its decoder starts with")
    return _encoder_decoder(encoded, pad_id, start_id)


def _packed(encoded: Sequence[TokenRow], read: Sequence[Sequence[int]]) -> ModelInputs:
    ids: list[int] = []
    positions, shapes, places = list[range](), list[tuple[int, list[int]]](), _Places()
    total = sum(len(item.prompt) + sum(counts) for item, counts in zip(encoded, read, strict=True))
    for item, counts in zip(encoded, read, strict=True):
        start, prompt = len(ids), len(item.prompt)
        whole = [item.whole(place) for place in range(len(item.responses))]
        common = _common([response for response, _ in whole], counts)
        ids += item.prompt + common
        positions.append(range(prompt + len(common)))
        branches = [max(count - len(common), 0) for count in counts]
        for (response, own), count, branch in zip(whole, counts, branches, strict=True):
            trunk = torch.arange(start + prompt, start + prompt + min(count, len(common)))
            places.add(
                torch.cat((trunk, torch.arange(len(ids), len(ids) + branch))),
                before=start + prompt - 1,
                own=own,
                length=len(response),
                outside=total,
            )
            ids += response[len(common) : len(common) + branch]
            positions.append(range(prompt + len(common), prompt + len(common) + branch))
        shapes.append((prompt + len(common), branches))
    return ModelInputs(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([[place for part in positions for place in part]]),
        # transformers passes a mask of four dimensions on as it is and makes none of its own.
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),
        predicted_from=torch.cat(places.predicted),
        placed_at=torch.cat(places.placed),
        tree=tree_of(shapes),
    )


class _Places:
    """Collects where the tokens of the responses are, one response after another."""

    def __init__(self) -> None:
        self.predicted: list[Tensor] = []
        self.placed: list[Tensor] = []

    def add(self, read_at: Tensor, *, before: int, own: Sequence[int], length: int, outside: int) -> None:
        """One response.

        Args:
            read_at: Where its first tokens are read, those of others among them.
            before: Where the last token of its prompt is read.
            own: Places of the tokens that the assistant writes.
            length: Of the response, with the tokens of others.
            outside: An index past every row, for tokens that are not there: to ask for one is an error.
        """
        missing = read_at.new_full((length - len(read_at),), outside)
        placed = torch.cat((read_at, missing))
        predicted = predicting_positions(placed, before)
        if len(own) < length:
            mine = torch.tensor(own, dtype=torch.long)
            placed, predicted = placed[mine], predicted[mine]
        self.placed.append(placed)
        self.predicted.append(predicted)


def _common(responses: Sequence[list[int]], counts: Sequence[int]) -> list[int]:
    """What all responses begin with, as far as any of them is read."""
    if len(responses) < 2:
        return []
    same = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*responses, strict=False))
    return [tokens[0] for tokens in same][: max(counts)]


def _padded(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])


def _separate(encoded: Sequence[TokenRow], read: Sequence[Sequence[int]], pad_id: int) -> ModelInputs:
    pairs = [
        (item.prompt, *item.whole(place), count)
        for item, counts in zip(encoded, read, strict=True)
        for place, count in enumerate(counts)
    ]
    rows = [prompt + response[:count] for prompt, response, _, count in pairs]
    width, places = max(map(len, rows)), _Places()
    for number, (prompt, response, own, count) in enumerate(pairs):
        start = number * width + len(prompt)
        places.add(
            torch.arange(start, start + count),
            before=start - 1,
            own=own,
            length=len(response),
            outside=len(rows) * width,
        )
    return ModelInputs(
        input_ids=_padded(rows, pad_id),
        position_ids=torch.arange(width).repeat(len(rows), 1),
        attention_mask=_padded([[1] * len(row) for row in rows], 0),
        predicted_from=torch.cat(places.predicted),
        placed_at=torch.cat(places.placed),
    )


def _encoder_decoder(encoded: Sequence[TokenRow], pad_id: int, start_id: int) -> ModelInputs:
    """The decoder reads ``[start | response]`` whole, its last token too: a reward is read after its token.

    Reward model and policy share this one layout, so a reward sees in use what it saw in training.
    """
    pairs = [(item.prompt, response) for item in encoded for response in item.responses]
    rows = [[start_id, *response] for _, response in pairs]
    width, places = max(map(len, rows)), _Places()
    for number, (_, response) in enumerate(pairs):
        start = number * width + 1
        places.add(
            torch.arange(start, start + len(response)),
            before=start - 1,
            own=range(len(response)),
            length=len(response),
            outside=len(rows) * width,
        )
    return ModelInputs(
        input_ids=_padded([prompt for prompt, _ in pairs], pad_id),
        position_ids=torch.arange(width).repeat(len(rows), 1),
        attention_mask=_padded([[1] * len(prompt) for prompt, _ in pairs], 0),
        predicted_from=torch.cat(places.predicted),
        placed_at=torch.cat(places.placed),
        decoder_ids=_padded(rows, pad_id),
    )
