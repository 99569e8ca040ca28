"""Which tokens of a packed row attend to which, in the form that each attention kernel takes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

PIECE = 128
"""Short branches are computed together, up to this many tokens, because each attention call has overhead."""

STRETCH = 512
"""A longer branch is computed in stretches of this many tokens, each with the keys up to its own end."""

BLOCK = 128
"""Tokens that flex attention computes together, or skips."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of one or more branches whose attention is computed in one call."""

    start: int  # position of the first key after the trunk, counted from the comparison's first token
    before: int  # number of keys between there and the first query: earlier stretches of the same branch
    length: int  # number of queries
    mask: (
        Tensor | None
    )  # [length, trunk + before + length] bool, which query attends to which key; None for a stretch

    def seen(self, trunk: int, device: torch.device) -> Tensor:
        """The mask. That of a stretch follows from its place: kept for all stretches, it would grow with the square of the length."""
        if self.mask is not None:
            return self.mask
        keys = trunk + self.before + self.length
        return torch.ones(self.length, keys, dtype=torch.bool, device=device).tril(trunk + self.before)


@dataclass(frozen=True, slots=True)
class PackedComparison:
    """One tree of a packed row."""

    trunk: int  # number of first tokens, which every branch attends to
    length: int  # number of all tokens
    pieces: tuple[Piece, ...]  # the branches, in order


@dataclass(frozen=True, slots=True)
class Sequences:
    """A packed row as sequences: each trunk with itself as keys, and each branch with its trunk and itself.

    The queries of the sequences are the row in its order. The last query of a sequence sees all of its keys, and each query
    before it sees one less.
    """

    keys: Tensor  # [m], position in the row of each key of each sequence
    query_ends: Tensor  # [s + 1] int32, where the queries of each sequence begin, and the end of the row
    key_ends: Tensor  # [s + 1] int32, where its keys begin in ``keys``, and m
    most_queries: int  # of a sequence
    most_keys: int


# Not a NamedTuple: torch.compile would specialize a graph on every number inside.
@dataclass(frozen=True)
class Tree:
    """Which tokens of a packed row attend to which."""

    comparisons: tuple[PackedComparison, ...]  # in the order of the row
    owner: Tensor  # [2 t] int: the comparison of each token, and its branch there (0 for the trunk)
    sequences: Sequences
    shapes: tuple[tuple[int, tuple[int, ...]], ...]  # lengths of trunk and branches of each comparison

    @cached_property
    def block_mask(self) -> BlockMask:
        """The mask for flex attention, which skips blocks that no query attends to.

        It is that of ``create_block_mask``, but made from the lengths: no matrix of all tokens exists.
        """
        comparison, branch = self.owner

        def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return _sees(comparison, branch, query, key)

        counts = visible_in_blocks(self.shapes)
        whole = counts == BLOCK * BLOCK
        blocks = [*_sorted_blocks((counts > 0) & ~whole), *_sorted_blocks(whole)]
        partial_count, partial, whole_count, full = (
            item.to(self.owner.device, non_blocking=True) for item in blocks
        )
        length = self.owner.shape[1]
        return BlockMask.from_kv_blocks(
            partial_count,
            partial,
            whole_count,
            full,
            BLOCK_SIZE=BLOCK,
            mask_mod=sees,
            seq_lengths=(length, length),
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The tree with its tensors on another device."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The tree with its tensors in page-locked memory."""
        return self._with_each(lambda tensor: tensor.pin_memory())

    def _with_each(self, changed: Callable[[Tensor], Tensor]) -> Self:
        comparisons = tuple(
            replace(
                item,
                pieces=tuple(
                    piece if piece.mask is None else replace(piece, mask=changed(piece.mask))
                    for piece in item.pieces
                ),
            )
            for item in self.comparisons
        )
        own = self.sequences
        sequences = replace(
            own,
            keys=changed(own.keys),
            query_ends=changed(own.query_ends),
            key_ends=changed(own.key_ends),
        )
        return type(self)(comparisons, changed(self.owner), sequences, self.shapes)


def tree_of(shapes: Sequence[tuple[int, Sequence[int]]]) -> Tree:
    """The tree of a packed row, from the lengths of the trunk and of the branches of each comparison."""
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
    owner = torch.stack((number, branch)).repeat_interleave(lengths, dim=1)
    kept = tuple((trunk, tuple(branches)) for trunk, branches in shapes)
    return Tree(tuple(comparisons), owner, _sequences(kept), kept)


def _sequences(shapes: Iterable[tuple[int, Sequence[int]]]) -> Sequences:
    start, keys, queries, seen = 0, list[Tensor](), [0], [0]
    for trunk, branches in shapes:
        shared = torch.arange(start, start + trunk)
        start += trunk
        keys.append(shared)
        queries.append(trunk)
        seen.append(trunk)
        for length in filter(None, branches):
            keys += (shared, torch.arange(start, start + length))
            start += length
            queries.append(length)
            seen.append(trunk + length)
    query_ends, key_ends = (torch.tensor(lengths).cumsum(0).int() for lengths in (queries, seen))
    return Sequences(torch.cat(keys), query_ends, key_ends, max(queries), max(seen))


def visible_in_blocks(shapes: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
    """Number of pairs of query and key, of which the first attends to the second, in each block.  -> [blocks blocks]

    ``shapes`` are the lengths of trunk and branches of each comparison. Blocks have :data:`BLOCK` tokens each way.
    """
    parts = [
        (length, number, branch > 0)
        for number, (trunk, branches) in enumerate(shapes)
        for branch, length in enumerate((trunk, *branches))
    ]
    lengths, owner, is_branch = torch.tensor(parts).T
    ends = lengths.cumsum(0)
    edges = BLOCK * torch.arange((int(ends[-1]) + BLOCK - 1) // BLOCK)
    # How many tokens of each part are in each block; float64 is exact here, and its products are fast.
    inside = torch.minimum(ends[:, None], edges + BLOCK) - torch.maximum((ends - lengths)[:, None], edges)
    inside = inside.clamp(min=0).double()
    # A part sees itself causally: every earlier block, and the lower triangle of a block that holds query and key.
    own = (inside.T @ inside).tril(-1) + torch.diag((inside * (inside + 1)).sum(0) / 2)
    trunks, branches = inside[is_branch == 0], is_branch == 1
    return (own + inside[branches].T @ trunks[owner[branches]]).long()


def _sorted_blocks(present: Tensor) -> tuple[Tensor, Tensor]:
    """Number of blocks of each row, and their indices first in each row.  [blocks blocks] -> [1 1 ...] int32 each"""
    order = present.int().argsort(dim=-1, descending=True, stable=True)
    return present.sum(-1).int()[None, None], order.int()[None, None].contiguous()


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
        yield Piece(start, before, queries, None)


def visible(owner: Tensor) -> Tensor:
    """The attention mask of a packed row as one dense matrix.  [2 t] -> [t t] bool"""
    places = torch.arange(owner.shape[1], device=owner.device)
    comparison, branch = owner
    return _sees(comparison, branch, places[:, None], places[None])


def _sees(comparison: Tensor, branch: Tensor, query: Tensor, key: Tensor) -> Tensor:
    same = comparison[query] == comparison[key]
    along = (branch[key] == 0) | (branch[query] == branch[key])
    return same & along & (query >= key)
