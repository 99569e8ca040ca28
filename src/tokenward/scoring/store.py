"""The score store: values per token in Parquet files, one row per response. It never holds a selection."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tokenward.artifacts import StagePart, atomic_write
from tokenward.distributed import gather
from tokenward.distributed import place as place_of_process
from tokenward.errors import UserError
from tokenward.scoring.reads import MissingValue
from tokenward.tokens.rows import TokenRow, keys_of
from tokenward.tokens.segments import spelled_all
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Template

_KEPT_SHARDS = 4

SEGMENT = "segment"
"""Column of the segments of tokens whose values came from another tokenizer; see :mod:`tokenward.ops.alignment`."""

T = TypeVar("T")


class TokenRecord(NamedTuple):
    """The stored values of one response.

    Attributes:
        key: Stable name of prompt and response.
        ids: Token ids, including the end-of-turn token.
        start: First byte of each token in the response's text.
        end: Byte after its last one; equal to ``start`` for tokens without text.
        values: One number per token for each named value.
        text: The text in which bytes are counted, if it is not the response's text in the data: everything between the
            prompt and the end of turn. Bytes that no token covers are context.
        segment: Segment of each token, from 0, if the values came from another tokenizer: tokens of one segment are scored and
            selected as one. Such values are float64, so that their sums are those of the other tokenizer.
    """

    key: str
    ids: list[int]
    start: list[int]
    end: list[int]
    values: dict[str, list[float]]
    text: str | None = None
    segment: list[int] | None = None

    def value(self, name: str) -> Tensor:
        """One named value.  -> [n] float32, or float64 if it came from another tokenizer

        Raises:
            UserError: The store has no such value.
        """
        if name not in self.values:
            raise MissingValue(
                name,
                f"the store has no {name}, which this scorer needs (it has {', '.join(self.values)}). Compute the values again "
                "with the model that gives it.",
            )
        return torch.tensor(self.values[name], dtype=torch.float32 if self.segment is None else torch.float64)


class ShardColumns(NamedTuple):
    """A file of the store: the records of ``r`` responses with their ``n`` tokens concatenated.

    ``starts [r + 1]`` holds the index of each response's first token; ``texts`` is None if no response has one.
    """

    keys: list[str]
    starts: np.ndarray
    ids: np.ndarray
    start: np.ndarray
    end: np.ndarray
    values: dict[str, np.ndarray]
    texts: list[str | None] | None = None
    segment: np.ndarray | None = None

    def record(self, row: int) -> TokenRecord:
        """The record of one response."""
        tokens = slice(int(self.starts[row]), int(self.starts[row + 1]))
        fixed = (column[tokens].tolist() for column in (self.ids, self.start, self.end))
        return TokenRecord(
            self.keys[row],
            *fixed,
            values={name: flat[tokens].tolist() for name, flat in self.values.items()},
            text=None if self.texts is None else self.texts[row],
            segment=None if self.segment is None else self.segment[tokens].tolist(),
        )


class _OpenShard(NamedTuple):
    """A shard that was read, and the row of each key."""

    columns: ShardColumns
    rows: dict[str, int]


class _Index(NamedTuple):
    """Where the keys of all shards are, by their hashes."""

    hashes: np.ndarray  # [responses], sorted
    order: np.ndarray  # [responses], for each hash the number of its response in the store
    ends: np.ndarray  # [shards], number of the first response after each

    @classmethod
    def of(cls, shards: Sequence[Path]) -> "_Index":
        hashes = [_hashes(keys) for keys in map(_keys, shards)]
        found = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
        order = np.argsort(found, kind="stable")
        return cls(found[order], order, np.cumsum([len(part) for part in hashes], dtype=np.int64))


class TokenStore:
    """A folder of Parquet files (shards) as a mapping from key to record.

    Shards are written in order, each atomically and with a fixed number of rows: an interrupted run continues with the next
    missing shard and produces the same bytes, and so do several jobs that write a part each. In memory are the last few
    shards that were read and, once keys were asked for in another order than the store's, 16 bytes per response.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards = sorted(folder.glob("tokens-*.parquet"))
        self._read: dict[int, _OpenShard] = {}
        self._last = -1  # the shard in which the last key was found

    @cached_property
    def _index(self) -> _Index:
        return _Index.of(self._shards)

    def __len__(self) -> int:
        return sum(pq.read_metadata(shard).num_rows for shard in self._shards)

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    def __iter__(self) -> Iterator[str]:
        for shard in self._shards:
            yield from _keys(shard)

    def __getitem__(self, key: str) -> TokenRecord:
        place = self._find(key)
        if place is None:
            raise self.missing_key(key)
        return self._opened(place[0]).columns.record(place[1])

    def missing_key(self, key: str) -> UserError:
        """The error for a response that is not in the store."""
        return UserError(
            f"the store {self.folder} has no values for the response {key}: it was computed from other data. Compute the scores "
            "of this data again.",
            code="missing-response",
        )

    @property
    def has_segments(self) -> bool:
        """Whether the values came from another tokenizer's tokens, so that tokens are in segments."""
        return bool(self._shards) and SEGMENT in pq.read_schema(self._shards[0]).names

    def columns(self) -> Iterator[ShardColumns]:
        """All shards in order, each read when its turn comes and not kept."""
        return map(_read, self._shards)

    def _find(self, key: str) -> tuple[int, int] | None:
        """Shard of a key, and its row there."""
        place = next(self._places(key), None)
        self._last = self._last if place is None else place[0]
        return place

    def _places(self, key: str) -> Iterator[tuple[int, int]]:
        """Places of a key; the last shards that were read and the next one are looked into before the others."""
        for shard, opened in reversed(self._read.items()):
            if key in opened.rows:
                yield shard, opened.rows[key]
        # Whoever reads the store in its order never needs the index, for which every shard must be read.
        following = self._last + 1
        if "_index" not in vars(self) and following < len(self._shards):
            rows = self._opened(following).rows
            if key in rows:
                yield following, rows[key]
        yield from self._indexed(key)

    def _indexed(self, key: str) -> Iterator[tuple[int, int]]:
        hashes, order, ends = self._index
        wanted = _hashes([key])[0]
        for number in range(int(np.searchsorted(hashes, wanted)), len(hashes)):
            if hashes[number] != wanted:  # several keys may have one hash
                return
            shard = int(np.searchsorted(ends, int(order[number]), side="right"))
            rows = self._opened(shard).rows
            if key in rows:
                yield shard, rows[key]

    def _opened(self, shard: int) -> _OpenShard:
        if shard not in self._read:
            if len(self._read) >= _KEPT_SHARDS:
                del self._read[next(iter(self._read))]
            columns = _read(self._shards[shard])
            self._read[shard] = _OpenShard(columns, dict(zip(columns.keys, count(), strict=False)))
        return self._read[shard]


def _hashes(keys: Sequence[str]) -> np.ndarray:
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, np.uint64)


def _keys(shard: Path) -> list[str]:
    table = _table(shard, ["key"])
    if (
        table.column_names != ["key"]
        or not pa.types.is_string(table.schema.field("key").type)
        or table["key"].null_count
    ):
        raise _damaged(shard, "it has no column key of texts")
    if not len(table):
        raise _damaged(shard, "it has no rows")
    return table["key"].to_pylist()


def _table(shard: Path, columns: list[str] | None = None) -> pa.Table:
    """Some columns of a shard, or all.

    Raises:
        UserError: its content is not what was written.
    """
    try:
        # read_table looks for a whole data set of files first, which takes several times as long as reading a small one.
        with pq.ParquetFile(shard, page_checksum_verification=True) as file:
            written = (file.schema_arrow.metadata or {}).get(_NAMES)
            if written is not None and written != _joined(file.schema_arrow.names):
                raise ValueError("the names of its columns are not those that were written")
            return file.read(columns, use_threads=False)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:  # also names that are no UTF-8
        raise _damaged(shard, " ".join(str(error).split())) from error


_NAMES = b"tokenward_columns"
"""Key of the file's metadata with the names of its columns: they are in its index, which has no checksum."""


def _joined(names: Iterable[str]) -> bytes:
    return json.dumps([*names]).encode()


def _damaged(shard: Path, problem: str) -> UserError:
    return UserError(
        f"{shard} is damaged: {problem}. Delete the file and run the recipe again, which computes its values anew.",
        code="damaged-files",
    )


def _lengths(lists: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.call_function("list_value_length", [lists])


def _check_table(shard: Path, table: pa.Table) -> None:
    """Refuse a shard that no version wrote: what a checksum of its pages does not see, because its index is damaged."""
    missing = [name for name in ("key", "ids", "start", "end") if name not in table.column_names]
    if missing or not len(table):
        raise _damaged(shard, f"it has no column {missing[0]}" if missing else "it has no rows")
    for name in table.column_names:
        kind, column = table.schema.field(name).type, table[name]
        if name in ("key", "text"):
            fits = pa.types.is_string(kind) and (name == "text" or not column.null_count)
        else:
            fits = pa.types.is_list(kind) and (
                pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type)
            )
            fits = fits and not column.null_count and _lengths(column).equals(_lengths(table["ids"]))
        if not fits:
            raise _damaged(shard, f"its column {name} does not have one value per token")


def _read(shard: Path) -> ShardColumns:
    table = _table(shard)
    _check_table(shard, table)
    names = [name for name in table.column_names if name not in ("key", "text")]
    lists = {name: table[name].combine_chunks() for name in names}
    flat = {name: column.flatten().to_numpy(zero_copy_only=False) for name, column in lists.items()}
    sizes = lists["ids"].value_lengths().to_numpy(zero_copy_only=False)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
    fixed = (flat.pop(name) for name in ("ids", "start", "end"))
    texts = table["text"].to_pylist() if "text" in table.column_names else None
    segment = flat.pop(SEGMENT, None)
    return ShardColumns(table["key"].to_pylist(), starts, *fixed, values=flat, texts=texts, segment=segment)


@dataclass(frozen=True)
class Shards:
    """The files of a store that may be incomplete.

    Attributes:
        folder: Where they are.
        rows: Number of items in all of them.
        rows_per_shard: Number of items in each, except the last.
    """

    folder: Path
    rows: int
    rows_per_shard: int

    def __len__(self) -> int:
        return len(range(0, self.rows, self.rows_per_shard))

    def path(self, number: int) -> Path:
        """The file of a shard, counted from 0."""
        return self.folder / f"tokens-{number:05d}.parquet"

    def items(self, number: int) -> range:
        """Indices of the items in a shard."""
        first = number * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.rows))

    def missing(self, part: StagePart | None = None) -> list[int]:
        """The shards that are not written yet; of one part, or of all."""
        mine = (number for number in range(len(self)) if part is None or part.has(number))
        return [number for number in mine if not self.path(number).exists()]

    def without_damaged(self, say: Callable[[str], None], part: StagePart | None = None) -> "Shards":
        """These shards, after those of a part, or of all, whose content is not what was written were deleted, each with a line."""
        for number in range(len(self)):
            shard = self.path(number)
            if (part is None or part.has(number)) and shard.exists():
                try:
                    _table(shard)
                except UserError:
                    shard.unlink()
                    say(f"  {shard} was damaged and has been deleted; its values are computed again")
        return self

    def waiting(self, table: TokenTable, part: StagePart | None = None) -> int:
        """Number of responses in the missing shards of a part; the items are the table's rows."""
        mine = [self.items(number) for number in self.missing(part)]
        return sum(int(table.starts[rows.stop] - table.starts[rows.start]) for rows in mine)

    def said_missing(self, part: StagePart, missing: Sequence[int]) -> str:
        """A line for a job that has written its part while others have not."""
        others = sorted({part.of_place(number) for number in missing})
        named = ", ".join(map(str, others[:8])) + (", ..." if len(others) > 8 else "")
        return (
            f"part {part} is written. {len(missing)} of {len(self)} shards are still missing, of part {named}. The job that finds all "
            "shards finishes the store; if a job was lost, run its part again"
        )


def copy_shards(shards: Shards) -> None:
    """Copy the shards that processes of this launch cannot see from the process whose part they are.

    They see all if they share the folder. A temporary one, or one of another machine, has a process's own part only.
    """
    missing, here = shards.missing(), place_of_process()
    for number in sorted({number for seen in gather(missing) for number in seen}):
        path, owner = shards.path(number), number % here.count
        content = gather(path.read_bytes() if here.rank == owner else b"")[owner]
        if number in missing:
            atomic_write(path, content)


def write_shards(
    folder: Path,
    items: Sequence[T],
    make: Callable[[Sequence[T]], Iterable[TokenRecord]],
    *,
    rows_per_shard: int,
    part: StagePart | None = None,
) -> TokenStore:
    """Write the records that ``make`` computes for some items, in their order. Shards that exist already are kept.

    An interrupted run must be continued with the same items: keys of responses or indices of rows. With a ``part``, only its
    shards are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = Shards(folder, len(items), rows_per_shard)
    for number in shards.missing(part):
        mine = shards.items(number)
        _write(shards.path(number), list(make(items[mine.start : mine.stop])))
    return TokenStore(folder)


def _write(shard: Path, records: Sequence[TokenRecord]) -> None:
    columns: dict[str, pa.Array] = {
        "key": pa.array([record.key for record in records], pa.string()),
        "ids": pa.array([record.ids for record in records], pa.list_(pa.int32())),
        "start": pa.array([record.start for record in records], pa.list_(pa.int32())),
        "end": pa.array([record.end for record in records], pa.list_(pa.int32())),
    }
    if any(record.text is not None for record in records):
        columns["text"] = pa.array([record.text for record in records], pa.string())
    kind = pa.float32()
    if records[0].segment is not None:
        columns[SEGMENT] = pa.array([record.segment for record in records], pa.list_(pa.int32()))
        kind = pa.float64()
    for name in records[0].values:
        columns[name] = pa.array([record.values[name] for record in records], pa.list_(kind))
    sink = pa.BufferOutputStream()
    table = pa.table(columns).replace_schema_metadata({_NAMES: _joined(columns)})
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    atomic_write(shard, sink.getvalue().to_pybytes())


Found = list[list[Tensor]]
"""For each row and response ``[len]``."""

ValueMaker = Callable[[Sequence[TokenRow], Callable[[int], None]], dict[str, Found]]
"""Computes values of some rows by name; its second argument is called with the number of responses done."""


def write_store(
    folder: Path,
    makers: Sequence[ValueMaker],
    template: Template,
    rows: TokenTable,
    *,
    shard_rows: int,
    progress: Callable[[int], None],
    reference: TokenStore | None = None,
    part: StagePart | None = None,
) -> TokenStore:
    """Compute and write the values of every response of a table, ``shard_rows`` prompts per shard.

    The responses to one prompt are in one shard, so that their prompt is computed once. Records in ``reference``, a store of
    the same responses, are copied; without ``makers``, which count what they compute, ``progress`` is called with the numbers of
    copied responses. With a ``part``, only its shards are written.
    """

    def make(numbers: Sequence[int]) -> Iterator[TokenRecord]:
        group = [rows[number] for number in numbers]
        return records_of(group, makers, template, progress=progress, reference=reference)

    return write_shards(folder, range(len(rows)), make, rows_per_shard=shard_rows, part=part)


def records_of(
    rows: Sequence[TokenRow],
    makers: Sequence[ValueMaker],
    template: Template,
    *,
    progress: Callable[[int], None] = lambda count: None,
    reference: TokenStore | None = None,
) -> Iterator[TokenRecord]:
    """The records of every response of some rows, with the values of all makers; ``reference`` as in :func:`write_store`."""
    values = {name: found for maker in makers for name, found in maker(rows, progress).items()}
    segment = values.pop(SEGMENT, None)
    records = iter(_empty_records(template, rows) if reference is None else _copies(rows, reference))
    for number, row in enumerate(rows):
        for place in range(len(row.responses)):
            record = next(records)
            own = {name: found[number][place].tolist() for name, found in values.items()}
            joined = record.segment if segment is None else segment[number][place].tolist()
            yield record._replace(values={**record.values, **own}, segment=joined)
        if not makers:
            progress(len(row.responses))


def _empty_records(template: Template, rows: Sequence[TokenRow]) -> Iterator[TokenRecord]:
    keys = [key for row in rows for key in keys_of(row.comparison)]
    responses = [(row, place) for row in rows for place in range(len(row.responses))]
    found = spelled_all(template.tokenizer, responses)
    for key, (row, place), (text, spans, own) in zip(keys, responses, found, strict=True):
        starts, ends = [span.start for span in spans], [span.end for span in spans]
        yield TokenRecord(key, row.responses[place], starts, ends, {}, None if own else text)


def _copies(rows: Sequence[TokenRow], store: TokenStore) -> Iterator[TokenRecord]:
    """The records of a store of the same responses."""
    for row in rows:
        for key, ids in zip(keys_of(row.comparison), row.responses, strict=True):
            record = store[key]
            assert record.ids == ids, f"the store {store.folder} has other tokens for the response {key}"
            yield record
