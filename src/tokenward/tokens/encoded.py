"""Encoded comparisons that are built when they are asked for, from a file of comparisons and one of their ids."""

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import overload

import numpy as np

from tokenward.data.choice import Choice
from tokenward.tokens.encode import Encoded, Limits, Sizes, judge
from tokenward.tokens.shards import EncodedFile


@dataclass(frozen=True, kw_only=True)
class EncodedRows(Sequence[Encoded]):
    """Chosen comparisons as token ids.

    Attributes:
        comparisons: Which they are.
        ids: The ids of everything in the file that these are chosen from.
        limits: Within which the ids were made.
    """

    comparisons: Choice
    ids: EncodedFile
    limits: Limits

    def __len__(self) -> int:
        return len(self.comparisons)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> "EncodedRows": ...
    def __getitem__(self, index: int | slice) -> "Encoded | EncodedRows":
        if isinstance(index, slice):
            return self.choose(np.arange(len(self))[index])
        number = range(len(self))[index]
        chosen = self.comparisons
        mine = slice(int(chosen.starts[number]), int(chosen.starts[number + 1]))
        rows, places = chosen.rows[mine].tolist(), chosen.places[mine].tolist()
        responses = [self.ids.response(row, place) for row, place in zip(rows, places, strict=True)]
        context = [self.ids.context(row, place) for row, place in zip(rows, places, strict=True)]
        return Encoded(
            chosen[number],
            self.ids.prompt(rows[0]),
            responses,
            self.closed[mine].tolist(),
            self.eos[mine].tolist(),
            context if any(context) else (),
            self.ids.opening(rows[0]),
        )

    def choose(self, numbers: np.ndarray) -> "EncodedRows":
        """The rows of these numbers, in their order."""
        return replace(self, comparisons=self.comparisons.choose(numbers))

    def then(self, other: "EncodedRows") -> "EncodedRows":
        """These rows and after them others of the same file."""
        return replace(self, comparisons=self.comparisons.then(other.comparisons))

    def of_place(self, place: int) -> "EncodedRows":
        """One response of each row, by its place in the row, as a row of its own."""
        chosen = self.comparisons
        alone = chosen.grouped(chosen.starts[:-1] + place, np.arange(len(self) + 1))
        return replace(self, comparisons=alone)

    @property
    def starts(self) -> np.ndarray:
        """The first response of each row.  -> [rows + 1]"""
        return self.comparisons.starts

    @cached_property
    def closed(self) -> np.ndarray:
        """Whether each response still has its end.  -> [responses] bool"""
        return self.of_responses("lengths") <= self.limits.max_response_tokens

    @cached_property
    def eos(self) -> np.ndarray:
        """How many tokens at the end of each closed response are no text.  -> [responses]"""
        return self.of_responses("eos")

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each response that the assistant wrote, as it is.  -> [responses] int64"""
        return self.of_responses("sizes").astype(np.int64)

    def of_responses(self, name: str) -> np.ndarray:
        """A column of the ids' file for each response of these rows.  -> [responses]"""
        starts = self.ids.starts()
        return self.ids.column(name)[starts[self.comparisons.rows] + self.comparisons.places]

    def of_rows(self, name: str) -> np.ndarray:
        """A column of the ids' file for the prompt of each row.  -> [rows]"""
        return self.ids.column(name)[self.comparisons.first_rows()]

    def judged(self) -> tuple["EncodedRows", Counter[str]]:
        """The rows that stay within the limits, and how many were dropped or changed for each reason.

        Raises:
            UserError: one is too long and ``limits.too_long`` is ``"error"``.
        """
        counts: Counter[str] = Counter(read=len(self))
        kept = array("q")
        digests = self.of_responses("digests")
        for number, (sizes, mine) in enumerate(self._sizes()):
            source = "" if self.limits.too_long != "error" else self.comparisons[number].source
            stays, notes = judge(sizes, self.limits, source, partial(_all_same, digests[mine]))
            counts.update(notes)
            if stays:
                kept.append(number)
        return self.choose(np.asarray(kept, np.int64)), counts

    def _sizes(self) -> Iterator[tuple[Sizes, slice]]:
        """What is judged of each row, and which responses are its own."""
        starts = self.comparisons.starts.tolist()
        lengths, notes = self.of_responses("lengths"), self.of_responses("notes")
        preludes = self.of_responses("preludes")
        prompts = self.of_rows("prompt_length").tolist()
        kept = np.diff(self.ids.starts("prompt"))[self.comparisons.first_rows()].tolist()
        for number, (first, last) in enumerate(pairwise(starts)):
            mine = slice(first, last)
            said = int(np.bitwise_or.reduce(notes[mine]))
            own = Sizes(prompts[number], kept[number], lengths[mine].tolist(), preludes[mine].tolist(), said)
            yield own, mine

    def by_prompt(self) -> "EncodedRows":
        """The distinct responses of each prompt as one row, so that the prompt is computed once.

        The ranks carry no meaning: pairs of one response may disagree about it.
        """
        rows = self.comparisons.rows
        # Of one prompt's ids the rows of some replies may begin with fewer than those of others.
        prompts = self.ids.column("prompt_key")[rows] ^ self.ids.column("prompt_digest")[rows]
        keys = self.of_responses("response_keys")
        _, first = np.unique(keys, return_index=True)
        first.sort()
        # Groups stand in the order of their first response, and responses in theirs.
        _, where, group = np.unique(prompts[first], return_index=True, return_inverse=True)
        group_first = where[group]
        order = np.lexsort((first, group_first))
        _, sizes = np.unique(group_first, return_counts=True)
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        return replace(self, comparisons=self.comparisons.grouped(first[order], starts))


def _all_same(digests: np.ndarray) -> bool:
    return len(digests) > 1 and bool((digests == digests[0]).all())


class Joined(Sequence[Encoded]):
    """Rows of several files, one after another."""

    def __init__(self, parts: Sequence[EncodedRows]) -> None:
        self.parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        part = int(np.searchsorted(self._ends, number, side="right"))
        return self.parts[part][number - (int(self._ends[part - 1]) if part else 0)]
