"""Rows of a stage that are built when they are asked for; their values per token lie in files, not in memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from tokenward.data.choice import chosen_parts
from tokenward.pipeline.data import response_keys
from tokenward.tokens.encode import Encoded
from tokenward.tokens.encoded import EncodedRows
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.shards import digest


class Responses(NamedTuple):
    """What is known of the responses of some rows, laid end to end.

    Attributes:
        starts: ``[rows + 1]``, the first response of each row.
        lengths: ``[r]``, in tokens.
        ranks: ``[r]``, 0 is the best.
        eos: ``[r]``, tokens at the end that are no text.
        keys: ``[r]`` uint64, stable names.
        digests: ``[r]`` uint64, hashes of the ids.
    """

    starts: np.ndarray
    lengths: np.ndarray
    ranks: np.ndarray
    eos: np.ndarray
    keys: np.ndarray
    digests: np.ndarray

    def of_rows(self, first: int, last: int) -> "Responses":
        """Those of some rows in sequence."""
        mine = slice(int(self.starts[first]), int(self.starts[last]))
        starts = self.starts[first : last + 1] - self.starts[first]
        return Responses(starts, *(column[mine] for column in self[1:]))


def responses_of(rows: Sequence[Encoded]) -> Responses:
    """What is known of the responses of encoded rows."""
    if isinstance(rows, EncodedRows):
        ranks = rows.of_responses("ranks") if rows.comparisons.kind == "whole" else _new_ranks(rows)
        eos = rows.closed * rows.eos
        keys, digests = rows.of_responses("response_keys"), rows.of_responses("digests")
        return Responses(rows.comparisons.starts, rows.lengths, ranks, eos, keys, digests)
    sizes = [len(row.responses) for row in rows]
    ids = [np.array(ids, np.int32) for row in rows for ids in row.responses]
    return Responses(
        starts=np.cumsum([0, *sizes]),
        lengths=np.array([len(item) for item in ids], np.int64),
        ranks=np.array([rank for row in rows for rank in row.comparison.ranks], np.int64),
        eos=np.array(
            [count * closed for row in rows for count, closed in zip(row.eos, row.closed, strict=True)],
            np.int64,
        ),
        keys=np.array([int(key, 16) for row in rows for key in response_keys(row)], np.uint64),
        digests=np.array([digest(item) for item in ids], np.uint64),
    )


def prompts_of(rows: Sequence[Encoded]) -> np.ndarray:
    """A hash of each row's prompt ids.  -> [rows] uint64"""
    if isinstance(rows, EncodedRows):
        return rows.of_rows("prompt_digest")
    return np.array([digest(np.array(row.prompt, np.int32)) for row in rows], np.uint64)


def _new_ranks(rows: EncodedRows) -> np.ndarray:
    """Ranks of pairs and groups: the place of each response in its own row; a row of one response has its own."""
    starts = rows.comparisons.starts
    sizes = np.diff(starts)
    places = np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)
    if rows.comparisons.kind != "pair" or not (sizes == 1).any():
        return places
    return np.where(np.repeat(sizes, sizes) == 1, rows.of_responses("ranks"), places)


class Column(NamedTuple):
    """One number per token.

    Attributes:
        flat: ``[n]`` float32.
        starts: ``[r]``, where each response of the rows begins; responses may share their numbers.
    """

    flat: np.ndarray
    starts: np.ndarray


VALUE = "value "
"""Before the name of a column that is one of ``TokenRow.values``."""


@dataclass(frozen=True, kw_only=True)
class LazyRows(Sequence[TokenRow]):
    """Encoded rows with values per token.

    Attributes:
        encoded: The rows.
        columns: By the name that the values have in :class:`TokenRow`; those of ``TokenRow.values`` have
            :data:`VALUE` before it.
    """

    encoded: Sequence[Encoded]
    columns: Mapping[str, Column] = field(default_factory=dict[str, Column])

    @cached_property
    def responses(self) -> Responses:
        """What is known of all responses."""
        return responses_of(self.encoded)

    def __len__(self) -> int:
        return len(self.encoded)

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...
    @overload
    def __getitem__(self, index: slice) -> "LazyRows": ...
    def __getitem__(self, index: int | slice) -> "TokenRow | LazyRows":
        if isinstance(index, slice):
            return self.choose(np.arange(len(self))[index])
        number = range(len(self))[index]
        found = {name: self.values(name, number) for name in self.columns}
        own = {name: values for name, values in found.items() if not name.startswith(VALUE)}
        further = {name.removeprefix(VALUE): values for name, values in found.items() if name not in own}
        return TokenRow(encoded=self.encoded[number], values=further, **own)

    def values(self, name: str, number: int) -> list[Tensor]:
        """The values of one row, ``[len]`` per response."""
        known = self.responses
        mine = slice(int(known.starts[number]), int(known.starts[number + 1]))
        flat, starts = self.columns[name]
        # Copies: what a row's owner does to them must not reach the file.
        sizes = zip(starts[mine].tolist(), known.lengths[mine].tolist(), strict=True)
        return [torch.from_numpy(np.array(flat[start : start + size], np.float32)) for start, size in sizes]

    def choose(self, numbers: np.ndarray) -> "LazyRows":
        """The rows of these numbers, in their order."""
        parts = chosen_parts(self.responses.starts, numbers)[1] if self.columns else None
        columns = {name: Column(flat, starts[parts]) for name, (flat, starts) in self.columns.items()}
        encoded = self.encoded
        if isinstance(encoded, EncodedRows):
            return LazyRows(encoded=encoded.choose(numbers), columns=columns)
        return LazyRows(encoded=[encoded[number] for number in numbers.tolist()], columns=columns)

    def with_column(self, name: str, column: Column) -> "LazyRows":
        """The same rows with further values."""
        return self._with({**self.columns, name: column})

    def without(self, name: str) -> "LazyRows":
        """The same rows without some values."""
        return self._with({key: column for key, column in self.columns.items() if key != name})

    def _with(self, columns: Mapping[str, Column]) -> "LazyRows":
        """The same responses under other columns; what is known of them is a hundred bytes a pair and is shared."""
        made = replace(self, columns=columns)
        vars(made)["responses"] = self.responses
        return made


class Mapped(Sequence[TokenRow]):
    """Rows to which something is done each time they are asked for."""

    def __init__(self, rows: Sequence[TokenRow], change: Callable[[TokenRow], TokenRow]) -> None:
        self._rows = rows
        self._change = change

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...
    @overload
    def __getitem__(self, index: slice) -> "Mapped": ...
    def __getitem__(self, index: int | slice) -> "TokenRow | Mapped":
        if isinstance(index, slice):
            return Mapped(self._rows[index], self._change)
        return self._change(self._rows[index])


def scratch(folder: Path, count: int) -> np.ndarray:
    """Room for float32 numbers on disk, which the system frees when nothing uses it any more.  -> [count]

    The numbers are in memory only as far as they are in use and there is room.
    """
    if not count:
        return np.zeros(0, np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=folder, prefix=".scratch-") as file:
        return np.memmap(file, np.float32, "w+", shape=(count,))


def own_starts(lengths: np.ndarray) -> np.ndarray:
    """Where each response begins if none shares its numbers with another.  [r] -> [r]"""
    return np.cumsum(lengths, dtype=np.int64) - lengths
