"""The table of all stages: encoded comparisons with named values per token.

A table refers to responses of an :class:`~tokenward.tokens.store.EncodedStore`, grouped into rows. Rows are built on access,
so a table of a million pairs takes a few dozen bytes per pair. Values per token are columns: flat arrays, in memory or in a
scratch file, which are joined to the responses by their stable keys.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal, NamedTuple, Self, overload

import numpy as np
import torch
from torch import Tensor

from tokenward.artifacts import atomic_file
from tokenward.data.pairs import pair_of, pair_places, ranked_places
from tokenward.data.prepare import comparison_key, whole_turns
from tokenward.tokens.encode import Limits, Sizes, judge
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.store import EncodedStore
from tokenward.types import Comparison

PAIRS = "pairs.npz"
"""File of the pairs of a run."""

Kind = Literal["whole", "pair", "group"]

_COLUMNS = ("weights", "reference_logp", "scores", "segments")
"""Columns that are fields of :class:`TokenRow`; all others are in ``TokenRow.values``."""

JOINT = "joint"
"""Column of the segments of tokens whose scores came from another tokenizer's tokens: they are selected as one."""

_KNOWN = ("lengths", "eos", "keys", "digests", "ranks", "_eos")
"""Cached properties that do not depend on the columns, so they are copied with the rows."""

_PROMPT = np.uint64(3)  # factor of the prompt's hash in names of prompt and response; sums wrap around

_LISTED_ROWS = 65536  # whose numbers are Python objects at once, which take eight times the memory

CHUNK_ROWS = 1024
"""Number of rows in memory at once while all rows of a table are processed."""


class Column(NamedTuple):
    """One number per token."""

    flat: np.ndarray  # [n] float32
    starts: np.ndarray  # [r], where each response begins. Responses may share their numbers

    def gathered(self, lengths: np.ndarray, first: int = 0) -> Tensor:
        """The numbers of consecutive responses, concatenated.  -> [n] float32"""
        found, done = np.empty(int(lengths.sum()), np.float32), 0
        starts = self.starts[first : first + len(lengths)]
        for start, size in zip(starts.tolist(), lengths.tolist(), strict=True):
            found[done : done + size] = self.flat[start : start + size]
            done += size
        return torch.from_numpy(found)


@dataclass(frozen=True, kw_only=True)
class TokenTable(Sequence[TokenRow]):
    """Rows of encoded comparisons, with columns of values per token.

    Attributes:
        store: The comparisons and their ids.
        kind: What a row is. ``whole``: a comparison of the store. ``pair``: two of its responses, the better one first, or a
            comparison with a single response. ``group``: responses to one prompt from any of its comparisons, whose ranks
            have no meaning.
        starts: ``[rows + 1]``, number of the first response of each row in this table.
        responses: ``[r]``, number of each response in the store.
        columns: Values per token, by name.
        scratch: Folder for new columns; None keeps them in memory.
        change: Applied to each row when it is built, such as to use another prompt.
    """

    store: EncodedStore
    kind: Kind
    starts: np.ndarray
    responses: np.ndarray
    columns: Mapping[str, Column] = field(default_factory=dict[str, Column])
    scratch: Path | None = None
    change: Callable[[TokenRow], TokenRow] | None = None

    @classmethod
    def whole(cls, store: EncodedStore, first: int = 0, last: int | None = None) -> Self:
        """Comparisons ``first`` to ``last`` of a store, with all their responses."""
        starts = store.starts[first : (len(store) if last is None else last) + 1]
        numbers = np.arange(starts[0], starts[-1])
        return cls(store=store, kind="whole", starts=starts - starts[0], responses=numbers)

    @classmethod
    def pairs(
        cls,
        store: EncodedStore,
        rule: str,
        *,
        min_gap: float | None = None,
        first: int = 0,
        last: int | None = None,
        progress: Callable[[int], None] = lambda count: None,
    ) -> Self:
        """The pairs of comparisons ``first`` to ``last`` by a rule of :mod:`tokenward.data.pairs`.

        A comparison with a single response is a row. ``progress`` is called with the numbers of comparisons read.
        """
        responses, sizes = array("q"), array("q")
        for row, start, ranks in _ranks_of(store, first, len(store) if last is None else last, progress):
            if len(ranks) == 1:
                found = [(0,)]
            elif min_gap is None:
                found = ranked_places(ranks, rule)
            else:
                found = pair_places(store.comparison(row), rule, min_gap=min_gap)
            for places in found:
                responses.extend(start + place for place in places)
                sizes.append(len(places))
        return cls.of_pairs(store, np.asarray(responses, np.int64), np.asarray(sizes, np.int64))

    @classmethod
    def of_pairs(cls, store: EncodedStore, responses: np.ndarray, sizes: np.ndarray) -> Self:
        """Known pairs, from the numbers of their responses in the store, and the size of each row, 2 or 1."""
        return cls(
            store=store, kind="pair", starts=_starts_of(sizes), responses=np.asarray(responses, np.int64)
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...
    @overload
    def __getitem__(self, index: slice) -> "TokenTable": ...
    def __getitem__(self, index: int | slice) -> "TokenRow | TokenTable":
        if isinstance(index, slice):
            return self.choose(np.arange(len(self))[index])
        number = range(len(self))[index]
        found = {name: self.values(name, number) for name in self.columns}
        own = {name: found.pop(name) for name in _COLUMNS if name in found}
        row = replace(self._row(number), values=found, **own)
        return row if self.change is None else self.change(row)

    def _row(self, number: int) -> TokenRow:
        store, numbers, places = self.store, self._of(number), self._places(number)
        context = [store.context(row, place) for row, place in places]
        first = places[0][0]
        return TokenRow(
            self._comparison(places),
            store.prompt(first),
            [store.response(row, place) for row, place in places],
            self._eos[numbers].tolist(),
            context if any(context) else (),
            store.opening(first),
        )

    @cached_property
    def _eos(self) -> np.ndarray:
        return self.store.column("eos")

    def _of(self, number: int) -> np.ndarray:
        """Numbers in the store of a row's responses."""
        return self.responses[int(self.starts[number]) : int(self.starts[number + 1])]

    def _places(self, number: int) -> list[tuple[int, int]]:
        """For each response of a row, its row in the store and its position there."""
        numbers = self._of(number)
        rows = self.store.owner[numbers].tolist()
        return list(zip(rows, (numbers - self.store.starts[rows]).tolist(), strict=True))

    def comparison(self, number: int) -> Comparison:
        """The comparison of a row, without its ids."""
        return self._comparison(self._places(number))

    def _comparison(self, parts: Sequence[tuple[int, int]]) -> Comparison:
        first = self.store.comparison(parts[0][0])
        if self.kind == "whole" or (self.kind == "pair" and len(parts) == 1):
            return first
        if self.kind == "pair":
            return pair_of(first, *(place for _, place in parts))
        rows = {parts[0][0]: first}
        rows |= {row: self.store.comparison(row) for row, _ in parts if row not in rows}
        return _group(first, [(rows[row], place) for row, place in parts])

    @property
    def sizes(self) -> np.ndarray:
        """Number of responses of each row.  -> [rows]"""
        return np.diff(self.starts)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each response, without inserts.  -> [r] int32"""
        return self.of_responses("sizes")

    @cached_property
    def eos(self) -> np.ndarray:
        """Number of eos tokens of each response.  -> [r]"""
        return self.of_responses("eos")

    @cached_property
    def keys(self) -> np.ndarray:
        """Stable names of the responses.  -> [r] uint64"""
        return self.of_responses("response_keys")

    @cached_property
    def digests(self) -> np.ndarray:
        """Hashes of the responses' ids.  -> [r] uint64"""
        return self.of_responses("digests")

    @cached_property
    def ranks(self) -> np.ndarray:
        """Rank of each response in its row, 0 is the best.  -> [r]"""
        if self.kind == "whole":
            return self.of_responses("ranks")
        places = np.arange(self.starts[-1], dtype=np.int32)
        places -= np.repeat(self.starts[:-1].astype(np.int32), self.sizes)
        if self.kind != "pair" or not (self.sizes == 1).any():
            return places
        # A single response keeps its rank: good or bad.
        return np.where(np.repeat(self.sizes, self.sizes) == 1, self.of_responses("ranks"), places)

    @property
    def prompts(self) -> np.ndarray:
        """Hashes of the prompts' ids.  -> [rows] uint64"""
        return self.of_rows("prompt_digest")

    def reply_names(self, place: int) -> np.ndarray:
        """Names of one response of each row together with its prompt, by its position.  -> [rows] uint64"""
        return self.prompts * _PROMPT + self.digests[self.starts[:-1] + place]

    def of_responses(self, name: str) -> np.ndarray:
        """A column of the store for each response of these rows.  -> [r]"""
        return self.store.column(name)[self.responses]

    def of_rows(self, name: str) -> np.ndarray:
        """A column of the store for the prompt of each row.  -> [rows]"""
        return self.store.column(name)[self.first_rows]

    @property
    def first_rows(self) -> np.ndarray:
        """Row in the store of each row's first response.  -> [rows]"""
        return self.store.owner[self.responses[self.starts[:-1]]]

    def values(self, name: str, number: int) -> list[Tensor]:
        """Values of a row in a column, ``[len]`` per response."""
        mine = slice(int(self.starts[number]), int(self.starts[number + 1]))
        flat, starts = self.columns[name]
        # Copies, so that changes to a row do not change the column.
        sizes = zip(starts[mine].tolist(), self.lengths[mine].tolist(), strict=True)
        return [torch.from_numpy(np.array(flat[start : start + size], np.float32)) for start, size in sizes]

    def choose(self, numbers: np.ndarray) -> "TokenTable":
        """The rows with these numbers, in this order."""
        starts, parts = _parts(self.starts, numbers)
        columns = {name: Column(flat, first[parts]) for name, (flat, first) in self.columns.items()}
        return replace(self, starts=starts, responses=self.responses[parts], columns=columns)

    def where(self, kept: np.ndarray) -> "TokenTable":
        """The rows for which ``kept`` is true.  [rows] bool"""
        return self.choose(np.flatnonzero(kept))

    def then(self, other: "TokenTable") -> "TokenTable":
        """These rows and then others of the same store, without columns."""
        assert other.store.paths == self.store.paths
        starts = np.concatenate([self.starts, other.starts[1:] + self.starts[-1]])
        responses = np.concatenate([self.responses, other.responses])
        return replace(self, starts=starts, responses=responses, columns={})

    def swapped(self) -> "TokenTable":
        """Pairs with the two responses swapped."""
        assert self.kind == "pair"
        assert bool((self.sizes == 2).all())
        return replace(self, responses=self.responses.reshape(-1, 2)[:, ::-1].reshape(-1), columns={})

    def of_place(self, place: int) -> "TokenTable":
        """Rows with one response each, given by its position."""
        responses = self.responses[self.starts[:-1] + place]
        return replace(self, kind="group", starts=np.arange(len(self) + 1), responses=responses, columns={})

    def by_prompt(self) -> "TokenTable":
        """One row for each prompt, with its distinct responses, so that the prompt is computed once."""
        # Pairs repeat their responses, so reduce to the first occurrence of each before the keys are sorted.
        place = np.full(int(self.store.starts[-1]), -1, np.int64)
        place[self.responses[::-1]] = np.arange(len(self.responses))[::-1]
        place = np.sort(place[place >= 0])
        _, first = np.unique(self.store.column("response_keys")[self.responses[place]], return_index=True)
        first = place[np.sort(first)]
        # Rows of the same prompt can contain different parts of its ids, because that depends on the replies.
        prompts = self.store.column("prompt_key") ^ self.store.column("prompt_digest")
        prompts = prompts[self.store.owner[self.responses[first]]]
        # Order groups by their first response, and the responses of a group as well.
        _, where, group = np.unique(prompts, return_index=True, return_inverse=True)
        order = np.lexsort((first, where[group]))
        _, sizes = np.unique(where[group], return_counts=True)
        responses = self.responses[first[order]]
        return replace(self, kind="group", starts=_starts_of(sizes), responses=responses, columns={})

    def best_once(self) -> "TokenTable":
        """Rows whose first response is the best of its prompt, one for each prompt.

        Several pairs of a ranked list would count its best response several times, and its second best as if it were the
        best. All good single responses are kept.
        """
        names = np.repeat(self.prompts, self.sizes) * _PROMPT + self.digests
        first = names[self.starts[:-1]]
        never_worse = np.flatnonzero(~np.isin(first, names[self.ranks > 0]))
        _, once = np.unique(np.where(self.sizes == 1, first, self.prompts)[never_worse], return_index=True)
        return self.choose(never_worse[np.sort(once)])

    def first_by_key(self, count: int) -> list[TokenRow]:
        """The rows with the smallest keys, among the last row of each prompt."""
        _, place = np.unique(self.prompts[::-1], return_index=True)
        last = len(self) - 1 - place
        order = np.argsort(self.of_rows("key")[last])
        return [self[number] for number in last[order][:count].tolist()]

    def fitting(self, limits: Limits) -> tuple["TokenTable", Counter[str]]:
        """The rows within the limits, and how many were dropped or changed for each reason.

        Raises:
            UserError: A row is too long and ``limits.too_long`` is ``"error"``.
        """
        counts: Counter[str] = Counter(read=len(self))
        columns = self._judged()
        kept, digests = columns.plain(limits, self.starts, self.digests), self.digests
        for number in np.flatnonzero(~kept).tolist():
            responses = slice(int(self.starts[number]), int(self.starts[number + 1]))
            own = digests[responses]
            source = "" if limits.too_long in ("drop", "truncate") else self.comparison(number).source
            kept[number], notes = judge(
                columns.sizes(number, responses),
                limits,
                source,
                lambda own=own: len(own) > 1 and bool((own == own[0]).all()),
            )
            counts.update(notes)
        counts["kept"] = int(kept.sum())
        return self.where(kept), counts

    def _judged(self) -> "_Judged":
        lengths, preludes, notes = map(self.of_responses, ("lengths", "preludes", "notes"))
        return _Judged(lengths, preludes, notes, self.of_rows("prompt_length"), self.of_rows("prompt_kept"))

    def with_column(self, name: str, column: Column) -> "TokenTable":
        """The rows with another column."""
        made = replace(self, columns={**self.columns, name: column})
        vars(made).update({name: found for name, found in vars(self).items() if name in _KNOWN})
        return made

    def room(self, count: int) -> np.ndarray:
        """An array for a column.  -> [count] float32

        In the scratch folder it is a file without a name, which the system removes when it is no longer used.
        """
        if not count or self.scratch is None:
            return np.zeros(count, np.float32)
        self.scratch.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=self.scratch, prefix=".scratch-") as file:
            return np.memmap(file, np.float32, "w+", shape=(count,))

    def own_column(self, parts: Iterator[Tensor] | Sequence[Tensor]) -> Column:
        """A column from the numbers of all responses, in parts of any size."""
        flat, done = self.room(int(self.lengths.sum())), 0
        for part in parts:
            flat[done : done + len(part)] = part.float().numpy()
            done += len(part)
        assert done == len(flat)
        return Column(flat, own_starts(self.lengths))


class _Judged(NamedTuple):
    """What :func:`judge` reads: three numbers per response, two per row."""

    lengths: np.ndarray
    preludes: np.ndarray
    notes: np.ndarray
    prompts: np.ndarray
    kept: np.ndarray

    def sizes(self, number: int, responses: slice) -> Sizes:
        """The sizes of one row."""
        notes = int(np.bitwise_or.reduce(self.notes[responses]))
        lengths, preludes = self.lengths[responses].tolist(), self.preludes[responses].tolist()
        return Sizes(int(self.prompts[number]), int(self.kept[number]), lengths, preludes, notes)

    def plain(self, limits: Limits, starts: np.ndarray, digests: np.ndarray) -> np.ndarray:
        """Which rows are kept and have nothing to be said of them; :func:`judge` decides about all others.  -> [rows] bool"""
        first, counts = starts[:-1], np.diff(starts)
        if not len(first) or not counts.all():  # reduceat takes neither
            return np.zeros(len(first), bool)
        read = self.preludes + np.minimum(self.lengths, np.int64(limits.max_response_tokens))
        differ = digests != np.repeat(digests[first], counts)
        plain = (np.bitwise_or.reduceat(self.notes, first) == 0) & (self.prompts > 0)
        plain &= (self.prompts <= limits.max_prompt_tokens) & (
            np.maximum.reduceat(self.lengths, first) <= limits.max_response_tokens
        )
        plain &= (counts == 1) | np.logical_or.reduceat(differ, first)
        if limits.context is not None:
            plain &= self.kept + np.maximum.reduceat(read, first) <= limits.context
        return plain


def _ranks_of(
    store: EncodedStore, first: int, last: int, progress: Callable[[int], None]
) -> Iterator[tuple[int, int, list[int]]]:
    """For each of some rows of a store its number, that of its first response, and the ranks of its responses."""
    ranks = store.column("ranks")
    for begin in range(first, last, _LISTED_ROWS):
        starts = store.starts[begin : min(begin + _LISTED_ROWS, last) + 1]
        listed, start = ranks[starts[0] : starts[-1]].tolist(), int(starts[0])
        for row, (one, other) in enumerate(pairwise(starts.tolist()), begin):
            yield row, one, listed[one - start : other - start]
        progress(len(starts) - 1)


def write_parts(path: Path, parts: Mapping[str, TokenTable]) -> None:
    """Write the responses of some tables of pairs."""
    arrays = {f"{name}_responses": table.responses for name, table in parts.items()}
    arrays |= {f"{name}_sizes": table.sizes for name, table in parts.items()}
    with atomic_file(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_parts(path: Path, store: EncodedStore) -> dict[str, TokenTable]:
    """The tables that :func:`write_parts` wrote."""
    with np.load(path) as arrays:
        names = [name.removesuffix("_sizes") for name in arrays.files if name.endswith("_sizes")]
        return {
            name: TokenTable.of_pairs(store, arrays[f"{name}_responses"], arrays[f"{name}_sizes"])
            for name in names
        }


def own_starts(lengths: np.ndarray) -> np.ndarray:
    """Where each response begins if none of them share their numbers.  [r] -> [r]"""
    return np.cumsum(lengths, dtype=np.int64) - lengths


def _starts_of(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def _parts(starts: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The starts of the chosen rows among themselves, and the numbers of their responses."""
    numbers = np.asarray(numbers, np.int64)
    begins, sizes = starts[:-1][numbers], np.diff(starts)[numbers]
    fresh = _starts_of(sizes)
    return fresh, np.arange(fresh[-1]) + np.repeat(begins - fresh[:-1], sizes)


def _group(first: Comparison, parts: Sequence[tuple[Comparison, int]]) -> Comparison:
    responses = tuple(row.responses[place] for row, place in parts)
    whole = len(parts) == len(first.responses) and all(row is first for row, _ in parts)
    spans = tuple(row.spans[place] for row, place in parts if row.spans is not None)
    turns = whole_turns([None if row.turns is None else row.turns[place] for row, place in parts])
    return Comparison(
        # The key does not depend on the order of the responses, and a row has each of its responses once.
        key=first.key if whole else comparison_key(first.prompt, responses, turns=turns, tools=first.tools),
        prompt=first.prompt,
        responses=responses,
        ranks=tuple(range(len(responses))),
        source=first.source,
        spans=spans if len(spans) == len(responses) else None,
        turns=turns,
        tools=first.tools,
    )
