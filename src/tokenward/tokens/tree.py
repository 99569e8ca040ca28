"""Packed comparisons as trees: a trunk that all responses of a comparison share, and a branch for each.

The row holds ``[trunk 1 | branch | branch | trunk 2 | branch | ...]`` without padding. A trunk sees itself,
a branch sees its trunk and itself, both causally; comparisons never see each other. Attention is
computed piece by piece, so that what cannot be seen costs nothing.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

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
