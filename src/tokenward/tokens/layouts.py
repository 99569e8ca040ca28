"""How comparisons are laid out as rows for a model, and where each response token is."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import takewhile
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from tokenward.tokens.rows import Layout, TokenRow

PIECE = 128
"""Short branches are computed together, up to so many tokens: a call has a cost of its own."""

STRETCH = 512
"""A longer branch is computed in stretches of so many tokens, each against the keys up to its own end."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of one or more branches whose attention is computed in one call.

    Attributes:
        start: Place of the first key behind the trunk, counted from the comparison's first token.
        before: Keys between there and the first query: earlier stretches of the same branch.
        length: Number of queries.
        mask: ``[length, trunk + before + length]`` bool, who sees whom.
    """

    start: int
    before: int
    length: int
    mask: Tensor


@dataclass(frozen=True, slots=True)
class PackedComparison:
    """One tree of a packed row.

    Attributes:
        trunk: Its first tokens, which every branch sees.
        length: All its tokens.
        pieces: The branches, in the row's order.
    """

    trunk: int
    length: int
    pieces: tuple[Piece, ...]


# Not a tuple: torch.compile would specialise a graph on every number inside.
@dataclass(frozen=True)
class Tree:
    """How the tokens of a packed row see each other.

    Attributes:
        comparisons: In the row's order.
        owner: ``[2 t]`` int: each token's comparison, and its branch there (0 for the trunk).
    """

    comparisons: tuple[PackedComparison, ...]
    owner: Tensor

    @cached_property
    def block_mask(self) -> BlockMask:
        """The same for flex attention, which passes over blocks that nobody sees."""
        comparison, branch = self.owner

        def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return _sees(comparison, branch, query, key)

        length = self.owner.shape[1]
        return create_block_mask(sees, 1, None, length, length, device=self.owner.device)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same tree with its masks on another device."""

        def moved(mask: Tensor) -> Tensor:
            return mask.to(device, non_blocking=non_blocking)

        comparisons = tuple(
            PackedComparison(
                item.trunk,
                item.length,
                tuple(Piece(p.start, p.before, p.length, moved(p.mask)) for p in item.pieces),
            )
            for item in self.comparisons
        )
        return type(self)(comparisons, moved(self.owner))


def tree_of(shapes: Sequence[tuple[int, Sequence[int]]]) -> Tree:
    """The tree of a packed row.

    Args:
        shapes: Per comparison the tokens of its trunk, and of each branch.
    """
    comparisons = [
        PackedComparison(trunk, trunk + sum(branches), tuple(_pieces(trunk, branches)))
        for trunk, branches in shapes
    ]
    parts = [
        (number, branch, length)
        for number, (trunk, branches) in enumerate(shapes)
        for branch, length in enumerate((trunk, *branches))
    ]
    number, branch, lengths = torch.tensor(parts).T
    return Tree(tuple(comparisons), torch.stack((number, branch)).repeat_interleave(lengths, dim=1))


def _pieces(trunk: int, branches: Iterable[int]) -> Iterator[Piece]:
    start, group = trunk, list[int]()
    for length in branches:
        if group and sum(group) + length > PIECE:
            yield _together(trunk, start, group)
            start, group = start + sum(group), []
        if length > STRETCH:
            yield from _stretches(trunk, start, length)
            start += length
        elif length:
            group.append(length)
    if group:
        yield _together(trunk, start, group)


def _together(trunk: int, start: int, branches: Sequence[int]) -> Piece:
    own = torch.block_diag(*(torch.ones(length, length).tril() for length in branches)).bool()
    return Piece(start, 0, len(own), torch.cat([own.new_ones(len(own), trunk), own], dim=1))


def _stretches(trunk: int, start: int, length: int) -> Iterator[Piece]:
    for before in range(0, length, STRETCH):
        queries = min(STRETCH, length - before)
        mask = torch.ones(queries, trunk + before + queries, dtype=torch.bool).tril(trunk + before)
        yield Piece(start, before, queries, mask)


def visible(owner: Tensor) -> Tensor:
    """Who sees whom in a packed row, as one dense mask.  [2 t] -> [t t] bool"""
    places = torch.arange(owner.shape[1], device=owner.device)
    comparison, branch = owner
    return _sees(comparison, branch, places[:, None], places[None])


def _sees(comparison: Tensor, branch: Tensor, query: Tensor, key: Tensor) -> Tensor:
    same = comparison[query] == comparison[key]
    along = (branch[key] == 0) | (branch[query] == branch[key])
    return same & along & (query >= key)


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
