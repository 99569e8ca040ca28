"""Some of the comparisons of a file, whole or as pairs, each built when it is asked for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, overload

import numpy as np

from tokenward.data.lines import ComparisonFile
from tokenward.data.pairs import pair_of
from tokenward.data.prepare import comparison_key, whole_turns
from tokenward.types import Comparison

Kind = Literal["whole", "pair", "group"]


@dataclass(frozen=True, kw_only=True)
class Choice(Sequence[Comparison]):
    """Comparisons named by where their responses stand in a file; a choice of a choice is one too.

    Attributes:
        file: Where the comparisons are.
        kind: ``whole`` comparisons of the file; ``pair``, of two responses of one, the better first, or a comparison
            that has one response; ``group``, of responses to one prompt from anywhere in the file, whose ranks carry no meaning.
        starts: ``[comparisons + 1]``, the first response of each, counted over this choice.
        rows: ``[responses]``, number of the comparison in the file.
        places: ``[responses]``, place of the response in that comparison.
    """

    file: ComparisonFile
    kind: Kind
    starts: np.ndarray
    rows: np.ndarray
    places: np.ndarray

    @classmethod
    def pairs(
        cls,
        file: ComparisonFile,
        rows: Sequence[int],
        places: Sequence[int],
        sizes: Sequence[int] | None = None,
    ) -> Self:
        """Pairs of responses, and comparisons that have one response.

        Args:
            file: Where the comparisons are.
            rows: ``[pairs]``, number of the comparison.
            places: Places of the better and the worse response of each pair, or of the only response.
            sizes: ``[pairs]``, 2 or 1; None where all are pairs.
        """
        counts = np.full(len(rows), 2) if sizes is None else np.asarray(sizes, np.int64)
        return cls(
            file=file,
            kind="pair",
            starts=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
            rows=np.repeat(np.asarray(rows, np.int64), counts),
            places=np.asarray(places, np.int32),
        )

    @classmethod
    def whole(cls, file: ComparisonFile, rows: Sequence[int], sizes: Sequence[int]) -> Self:
        """Comparisons as they are in the file.

        Args:
            file: Where they are.
            rows: ``[comparisons]``, their numbers.
            sizes: ``[comparisons]``, how many responses each has.
        """
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(sizes, np.int64))])
        numbers = np.arange(starts[-1])
        repeated = np.asarray(sizes, np.int64)
        places = numbers - np.repeat(starts[:-1], repeated)
        rows_of = np.repeat(np.asarray(rows, np.int64), repeated)
        return cls(file=file, kind="whole", starts=starts, rows=rows_of, places=places.astype(np.int32))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> Comparison: ...
    @overload
    def __getitem__(self, index: slice) -> "Choice": ...
    def __getitem__(self, index: int | slice) -> "Comparison | Choice":
        if isinstance(index, slice):
            return self.choose(np.arange(len(self))[index])
        number = range(len(self))[index]
        responses = slice(int(self.starts[number]), int(self.starts[number + 1]))
        rows, places = self.rows[responses].tolist(), self.places[responses].tolist()
        return self._build(rows, places)

    def _build(self, rows: list[int], places: list[int]) -> Comparison:
        first = self.file[rows[0]]
        if self.kind == "whole" or (self.kind == "pair" and len(places) == 1):
            return first
        if self.kind == "pair":
            return pair_of(first, *places)
        owners = {rows[0]: first} | {row: self.file[row] for row in set(rows[1:]) - {rows[0]}}
        return _group(first, [(owners[row], place) for row, place in zip(rows, places, strict=True)])

    def choose(self, numbers: np.ndarray) -> "Choice":
        """The comparisons of these numbers, in their order."""
        starts, responses = chosen_parts(self.starts, numbers)
        return replace(self, starts=starts, rows=self.rows[responses], places=self.places[responses])

    def swapped(self) -> "Choice":
        """Pairs with the worse response in the place of the better one."""
        assert self.kind == "pair"
        assert bool((np.diff(self.starts) == 2).all())
        return replace(self, places=self.places.reshape(-1, 2)[:, ::-1].reshape(-1))

    def then(self, other: "Choice") -> "Choice":
        """These comparisons and after them others of the same file."""
        return replace(
            self,
            starts=np.concatenate([self.starts, other.starts[1:] + self.starts[-1]]),
            rows=np.concatenate([self.rows, other.rows]),
            places=np.concatenate([self.places, other.places]),
        )

    def first_rows(self) -> np.ndarray:
        """Number in the file of each comparison's first response.  -> [comparisons]"""
        return self.rows[self.starts[:-1]]

    def grouped(self, responses: np.ndarray, starts: np.ndarray) -> "Choice":
        """Responses of this choice put together by prompt.

        Args:
            responses: Their numbers in this choice, group after group.
            starts: ``[groups + 1]``, the first of each group among them.
        """
        return replace(
            self, kind="group", starts=starts, rows=self.rows[responses], places=self.places[responses]
        )


def _group(first: Comparison, parts: Sequence[tuple[Comparison, int]]) -> Comparison:
    responses = tuple(row.responses[place] for row, place in parts)
    spans = tuple(row.spans[place] for row, place in parts if row.spans is not None)
    turns = whole_turns([None if row.turns is None else row.turns[place] for row, place in parts])
    return Comparison(
        key=comparison_key(first.prompt, responses, turns=turns, tools=first.tools),
        prompt=first.prompt,
        responses=responses,
        ranks=tuple(range(len(responses))),
        source=first.source,
        spans=spans if len(spans) == len(responses) else None,
        turns=turns,
        tools=first.tools,
    )


def chosen_parts(starts: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The parts of some items, where items have several parts each and all parts lie end to end.

    Args:
        starts: ``[items + 1]``, the first part of each item.
        numbers: ``[m]``, the items wanted.

    Returns:
        ``[m + 1]``, the first part of each wanted item once only these are left, and the parts' numbers.
    """
    numbers = np.asarray(numbers, np.int64)
    begins, sizes = starts[:-1][numbers], np.diff(starts)[numbers]
    fresh = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    return fresh, np.arange(fresh[-1]) + np.repeat(begins - fresh[:-1], sizes)
