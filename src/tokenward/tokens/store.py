"""Encoded comparisons as Arrow columns, in memory or in a memory-mapped file.

A row has a comparison, the ids of its prompt and of all its responses, and their lengths before truncation. So the rows can
be used for any rule of pairs, and it is decided on reading which pairs fit the limits. On disk, rows are written in shards
of a fixed size, each atomically, which are joined at the end. A stopped run continues with the next shard. Neither stops nor
the number of processes change the bytes.
"""

import hashlib
import multiprocessing
import os
import signal
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cached_property
from itertools import accumulate, islice
from multiprocessing import connection
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from tokenward.artifacts import atomic_file
from tokenward.data.files import from_line, line_ends, to_line
from tokenward.tokens.encode import Limits, encode_parts, eos_left
from tokenward.tokens.rows import prompt_and_response_keys
from tokenward.tokens.split import Insert, RowIds
from tokenward.tokens.template import Template
from tokenward.types import Comparison

ENCODED = "encoded.arrow"
SHARD_ROWS = 1024

_TOKENIZED_AT_ONCE = 128
_MOST_PROCESSES = 8
_SHARDS_WORTH_A_PROCESS = 2  # starting a process takes longer than encoding fewer

_IDS, _KEY = pa.int32(), pa.uint64()
SCHEMA = pa.schema(
    {
        "comparison": pa.binary(),  # JSON line of tokenward.data.files
        "key": _KEY,  # of the comparison
        "prompt_key": _KEY,  # hash of the prompt's messages
        "prompt": pa.list_(_IDS),
        "prompt_length": pa.int32(),  # before truncation
        "prompt_kept": pa.int32(),
        "prompt_digest": _KEY,  # hash of the prompt's ids
        "opening": pa.list_(_IDS),
        "responses": pa.list_(pa.list_(_IDS)),
        "context": pa.list_(pa.list_(_IDS)),  # for each insert: the token it precedes, its length, its ids
        "lengths": pa.list_(pa.int32()),  # before truncation, with the context after the first token
        "sizes": pa.list_(pa.int32()),  # of the entries of responses
        "preludes": pa.list_(pa.int32()),  # length of the context before the first token
        "eos": pa.list_(pa.int32()),  # number of eos tokens after truncation
        "notes": pa.list_(pa.int32()),  # bits of tokenward.tokens.split.Note, including the prompt's
        "ranks": pa.list_(pa.int32()),
        "response_keys": pa.list_(_KEY),
        "digests": pa.list_(_KEY),  # hash of the response's ids
    }
)


def digest(ids: np.ndarray) -> int:
    """A 64-bit hash of token ids."""
    content = np.ascontiguousarray(ids, np.int32).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


class EncodedStore:
    """Encoded comparisons by their number.

    Args:
        batches: Record batches of :data:`SCHEMA`, one after another.
        paths: The mapped files; empty if the batches are in memory.
    """

    def __init__(self, batches: Sequence[pa.RecordBatch], paths: Sequence[Path] = ()) -> None:
        self._batches, self.paths = list(batches), tuple(paths)
        self._first = list(accumulate((batch.num_rows for batch in self._batches), initial=0))
        self._opened: dict[tuple[str, int], tuple[np.ndarray, ...]] = {}

    @classmethod
    def open(cls, paths: Sequence[Path]) -> "EncodedStore":
        """Map files written by :func:`write_encoded`."""
        readers = [pa.ipc.open_file(pa.memory_map(str(path))) for path in paths]
        batches = [reader.get_batch(n) for reader in readers for n in range(reader.num_record_batches)]
        return cls(batches, paths)

    @classmethod
    def made(cls, rows: Iterable[Comparison], template: Template, limits: Limits) -> "EncodedStore":
        """Encode comparisons in memory."""
        lines = ((row, to_line(row).encode()) for row in rows)
        return cls(list(_encoded(lines, template, limits)))

    def __reduce__(self) -> tuple[object, ...]:
        # A memory map cannot be pickled, so another process opens the file again.
        if self.paths:
            return EncodedStore.open, (self.paths,)
        return EncodedStore, (self._batches,)

    def __len__(self) -> int:
        return self._first[-1]

    @cached_property
    def starts(self) -> np.ndarray:
        """Number of the first response of each row.  -> [rows + 1] int64"""
        sizes = [np.diff(_offsets(batch.column("lengths"))) for batch in self._batches]
        return np.cumsum(np.concatenate([np.zeros(1, np.int64), *sizes]))

    @cached_property
    def owner(self) -> np.ndarray:
        """Row of each response.  -> [responses] int32"""
        return np.repeat(np.arange(len(self), dtype=np.int32), np.diff(self.starts))

    def column(self, name: str) -> np.ndarray:
        """A column with one number per row or per response, concatenated."""
        kind = SCHEMA.field(name).type
        empty = np.zeros(0, (kind.value_type if pa.types.is_list(kind) else kind).to_pandas_dtype())
        return np.concatenate([_flat(batch.column(name)) for batch in self._batches] or [empty])

    def comparison(self, row: int) -> Comparison:
        """The comparison of a row."""
        batch, place = self._place(row)
        return from_line(self._batches[batch].column("comparison")[place].as_py())

    def prompt(self, row: int) -> list[int]:
        """Ids of a row's prompt."""
        return self._ids("prompt", row)

    def opening(self, row: int) -> list[int]:
        """Ids that follow the prompt for generation."""
        return self._ids("opening", row)

    def response(self, row: int, place: int) -> list[int]:
        """Ids of a response, by its position in the row."""
        return self._nested("responses", row, place)

    def context(self, row: int, place: int) -> list[Insert]:
        """The tokens in a response that are not the assistant's."""
        numbers, found, at = self._nested("context", row, place), list[Insert](), 0
        while at < len(numbers):
            before, length = numbers[at : at + 2]
            found.append(Insert(before, numbers[at + 2 : at + 2 + length]))
            at += 2 + length
        return found

    def first_with(self, note: int) -> int | None:
        """Number of the first row with a note on its prompt or on a response; None if no row has it."""
        noted = np.flatnonzero(self.column("notes") & int(note))
        return int(self.owner[noted[0]]) if len(noted) else None

    def _place(self, row: int) -> tuple[int, int]:
        batch = bisect_right(self._first, row) - 1
        return batch, row - self._first[batch]

    def _ids(self, name: str, row: int) -> list[int]:
        batch, place = self._place(row)
        starts, ids = self._views(name, batch)
        return ids[starts[place] : starts[place + 1]].tolist()

    def _nested(self, name: str, row: int, place: int) -> list[int]:
        batch, at = self._place(row)
        owner, starts, ids = self._views(name, batch)
        number = owner[at] + place
        return ids[starts[number] : starts[number + 1]].tolist()

    def _views(self, name: str, number: int) -> tuple[np.ndarray, ...]:
        """Offsets and ids of a column of a batch. They are views, not copies, so all that were used are kept."""
        key = name, number
        if key not in self._opened:
            column = self._batches[number].column(name)
            nested = pa.types.is_list(column.type.value_type)
            inner = (_offsets(column.values), _flat(column.values)) if nested else (_flat(column),)
            self._opened[key] = (_offsets(column), *inner)
        return self._opened[key]


def _flat(column: pa.Array) -> np.ndarray:
    values = column.values if isinstance(column, pa.ListArray) else column
    return values.to_numpy(zero_copy_only=True)


def _offsets(column: pa.Array) -> np.ndarray:
    return column.offsets.to_numpy(zero_copy_only=True)


def _record(row: Comparison, line: bytes, ids: RowIds, limits: Limits) -> dict[str, Any]:
    """A comparison as a row of the schema. Ids are arrays, because lists of numbers take ten times the memory."""
    prompt_key, *keys = prompt_and_response_keys(row)
    prompt = np.array(ids.prompt, np.int32)
    responses = [np.array(own.ids, np.int32) for own in ids.responses]
    return {
        "comparison": line,
        "key": int(row.key, 16),
        "prompt_key": int(prompt_key, 16),
        "prompt": prompt,
        "prompt_length": ids.prompt_length,
        "prompt_kept": len(prompt),
        "prompt_digest": digest(prompt),
        "opening": np.array(ids.opening, np.int32),
        "responses": responses,
        "context": [_numbers_of(own.context) for own in ids.responses],
        "lengths": [own.length for own in ids.responses],
        "sizes": [len(own) for own in responses],
        "preludes": [own.prelude for own in ids.responses],
        "eos": [eos_left(own, limits) for own in ids.responses],
        "notes": [int(ids.notes | own.notes) for own in ids.responses],
        "ranks": list(row.ranks),
        "response_keys": [int(key, 16) for key in keys],
        "digests": [digest(own) for own in responses],
    }


def _numbers_of(context: Sequence[Insert]) -> np.ndarray:
    parts = [(insert.before, len(insert.ids), *insert.ids) for insert in context]
    return np.array([number for part in parts for number in part], np.int32)


def _encoded(
    rows: Iterator[tuple[Comparison, bytes]], template: Template, limits: Limits
) -> Iterator[pa.RecordBatch]:
    """One batch per shard, of comparisons and their lines."""
    while shard := list(islice(rows, SHARD_ROWS)):
        records: list[dict[str, Any]] = []
        for start in range(0, len(shard), _TOKENIZED_AT_ONCE):
            some = shard[start : start + _TOKENIZED_AT_ONCE]
            found = zip(some, encode_parts([row for row, _ in some], template, limits), strict=True)
            records += [_record(row, line, ids, limits) for (row, line), ids in found]
        yield pa.RecordBatch.from_pylist(records, schema=SCHEMA)


def write_encoded(
    folder: Path,
    files: Sequence[Path],
    template: Template,
    limits: Limits,
    *,
    processes: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Encode the comparisons of some files into ``encoded.arrow``. Shards that already exist are kept.

    Args:
        folder: Folder of the result.
        files: Comparisons as JSON lines. Their rows are numbered consecutively.
        template: Writes the comparisons.
        limits: Limits of prompt and response. ``context`` is applied when the rows are read.
        processes: Number of processes; None depends on the amount of data.
        progress: Called with numbers of finished comparisons.
    """
    work = _Work(folder, _shards_of(files), template, limits)
    missing = [number for number in range(len(work.shards)) if not _shard(folder, number).exists()]
    if processes is None:
        # Not all cores may be available to this process, such as in a container.
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        processes = min(allowed, _MOST_PROCESSES, len(missing) // _SHARDS_WORTH_A_PROCESS)
    for number in _written(work, missing, min(processes, len(missing))):
        if progress is not None:
            progress(work.shards[number].rows)
    _join(folder, len(work.shards))


class _Lines(NamedTuple):
    """Some lines of a file, by their bytes."""

    file: Path
    start: int
    end: int
    rows: int

    def read(self) -> Iterator[tuple[Comparison, bytes]]:
        """The comparisons, and their lines with the line ends."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            for line in islice(file, self.rows):
                yield from_line(line), line


def _shards_of(files: Sequence[Path]) -> list[_Lines]:
    found: list[_Lines] = []
    for path in files:
        ends = np.concatenate([np.zeros(1, np.int64), line_ends(path)])
        for first in range(0, len(ends) - 1, SHARD_ROWS):
            last = min(first + SHARD_ROWS, len(ends) - 1)
            found.append(_Lines(path, int(ends[first]), int(ends[last]), last - first))
    return found


class _Work(NamedTuple):
    """Everything that a process needs to write any shard."""

    folder: Path
    shards: list[_Lines]
    template: Template
    limits: Limits

    def write(self, number: int) -> int:
        (batch,) = _encoded(self.shards[number].read(), self.template, self.limits)
        with atomic_file(_shard(self.folder, number)) as file, pa.ipc.new_file(file, SCHEMA) as writer:
            writer.write_batch(batch)
        return number


def _written(work: _Work, numbers: Sequence[int], processes: int) -> Iterator[int]:
    """Writes shards, in this process or in others, and yields their numbers as they are done."""
    if processes <= 1:
        yield from map(work.write, numbers)
        return
    # A forked process starts at once. Other systems cannot fork, or not safely.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(work,)) as pool:
        try:
            for done in as_completed([pool.submit(_write, number) for number in numbers]):
                yield done.result()
        finally:  # after an error or Ctrl-C, waiting shards must not start
            pool.shutdown(cancel_futures=True)


_work: list[_Work] = []  # of this process, if it belongs to a pool


def _begin(work: _Work) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C stops the parent, which stops these
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the handler of the parent
    Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _work[:] = [work]


def _end_with_parent() -> None:
    """End this process when its parent has ended, even if a signal killed it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _write(number: int) -> int:
    return _work[0].write(number)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"rows-{number:05d}.arrow"


def _join(folder: Path, count: int) -> None:
    """Joins the shards into one file, with a record batch each, and removes them."""
    shards = [_shard(folder, number) for number in range(count)]
    with atomic_file(folder / ENCODED) as file, pa.ipc.new_file(file, SCHEMA) as writer:
        for shard in shards:
            with pa.memory_map(str(shard)) as source:
                writer.write_batch(pa.ipc.open_file(source).get_batch(0))
    for shard in shards:
        shard.unlink()
