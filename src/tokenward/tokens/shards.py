"""Comparisons as token ids on disk: Arrow, one row per comparison of a file, read through a memory map.

A row holds the prompt and all K responses once, whatever pairs are made of them, and each length before
anything was cut, so that it is judged when read which pairs stay. Rows are written in shards of a fixed
number, each atomically, and joined at the end: a stopped run goes on with the next shard, and neither the
stops nor the number of processes show in the bytes.
"""

import hashlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from tokenward.artifacts import atomic_file
from tokenward.data.lines import ComparisonFile
from tokenward.tokens.encode import Insert, Limits, Parts, encode_parts, keys_of, response_key
from tokenward.tokens.template import Template
from tokenward.types import Comparison

ENCODED = "encoded.arrow"
SHARD_ROWS = 1024

_TOKENIZED_AT_ONCE = 128
_MOST_PROCESSES = 8
_SHARDS_WORTH_A_PROCESS = 2  # fewer take less time than starting one

_IDS, _KEY = pa.int32(), pa.uint64()
SCHEMA = pa.schema(
    {
        "key": _KEY,  # of the comparison
        "prompt_key": _KEY,  # hash of the prompt's messages
        "prompt": pa.list_(_IDS),
        "prompt_length": pa.int32(),
        "prompt_digest": _KEY,  # hash of the prompt's ids
        "opening": pa.list_(_IDS),
        "responses": pa.list_(pa.list_(_IDS)),
        "context": pa.list_(
            pa.list_(_IDS)
        ),  # per insert: the place before which it stands, its length, its ids
        "lengths": pa.list_(pa.int32()),  # with context behind the first token, before anything was cut
        "sizes": pa.list_(pa.int32()),  # of what is in responses
        "preludes": pa.list_(pa.int32()),  # of the context before its first token
        "eos": pa.list_(pa.int32()),
        "notes": pa.list_(pa.int32()),  # bits of tokenward.tokens.split.Note, the prompt's among them
        "ranks": pa.list_(pa.int32()),
        "response_keys": pa.list_(_KEY),
        "digests": pa.list_(_KEY),  # hash of the response's ids
    }
)


_NESTED = ("responses", "context")
"""Columns with a list of ids for each response."""


def _packed(context: Sequence[Insert]) -> np.ndarray:
    """Inserts as numbers in a row."""
    parts = [(insert.before, len(insert.ids), *insert.ids) for insert in context]
    return np.array([number for part in parts for number in part], np.int32)


def _unpacked(numbers: list[int]) -> list[Insert]:
    """What :func:`_packed` wrote."""
    found, place = list[Insert](), 0
    while place < len(numbers):
        before, length = numbers[place : place + 2]
        found.append(Insert(before, numbers[place + 2 : place + 2 + length]))
        place += 2 + length
    return found


def digest(ids: np.ndarray) -> int:
    """A hash of 64 bits of token ids."""
    content = np.ascontiguousarray(ids, np.int32).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def default_processes() -> int:
    """One per core that this process may use, within reason."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, _MOST_PROCESSES)


def write_encoded(
    folder: Path,
    file: ComparisonFile,
    template: Template,
    limits: Limits,
    *,
    processes: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Encode all comparisons of a file into ``encoded.arrow``; shards that are there already are kept.

    Args:
        folder: Where it goes.
        file: The comparisons.
        template: Writes them.
        limits: Of prompt and response; ``context`` is not looked at, it is judged when read.
        processes: How many share the work; None is as many as pay.
        progress: Called with the number of comparisons done.
    """
    count = -(-len(file) // SHARD_ROWS)
    missing = [number for number in range(count) if not _shard(folder, number).exists()]
    if processes is None:
        processes = min(default_processes(), len(missing) // _SHARDS_WORTH_A_PROCESS)
    work = _Work(folder, file, template, limits)
    for number in _carried_out(work, missing, min(processes, len(missing))):
        if progress is not None:
            progress(min(SHARD_ROWS, len(file) - number * SHARD_ROWS))
    _join(folder, count)


class _Work(NamedTuple):
    """Everything that a process needs to write any shard."""

    folder: Path
    file: ComparisonFile
    template: Template
    limits: Limits

    def write(self, number: int) -> int:
        """Write one shard; returns its number."""
        first = number * SHARD_ROWS
        last = min(first + SHARD_ROWS, len(self.file))
        columns = _Columns()
        for start in range(first, last, _TOKENIZED_AT_ONCE):
            rows = self.file[start : min(start + _TOKENIZED_AT_ONCE, last)]
            for row, parts in zip(rows, encode_parts(rows, self.template, self.limits), strict=True):
                columns.add(row, parts)
        with (
            atomic_file(_shard(self.folder, number)) as file,
            pa.ipc.new_file(file, SCHEMA) as writer,
        ):
            writer.write_batch(columns.batch())
        return number


class _Columns:
    """Columns of a shard as they grow; ids as arrays, since lists of numbers take ten times the memory."""

    def __init__(self) -> None:
        self.rows: dict[str, list[object]] = {name: [] for name in SCHEMA.names if name not in _NESTED}
        self.nested: dict[str, list[np.ndarray]] = {name: [] for name in _NESTED}
        self.sizes: list[int] = []

    def add(self, row: Comparison, parts: Parts) -> None:
        """Append a comparison."""
        prompt = np.array(parts.prompt, np.int32)
        responses = [np.array(own.ids, np.int32) for own in parts.responses]
        context = [_packed(own.context) for own in parts.responses]
        values = {
            "key": int(row.key, 16),
            "prompt_key": int(response_key(row.prompt, "", row.tools), 16),
            "prompt": prompt,
            "prompt_length": parts.prompt_length,
            "prompt_digest": digest(prompt),
            "opening": np.array(parts.opening, np.int32),
            "lengths": [own.length for own in parts.responses],
            "sizes": [len(ids) for ids in responses],
            "preludes": [own.prelude for own in parts.responses],
            "eos": [own.eos for own in parts.responses],
            "notes": [int(parts.notes | own.notes) for own in parts.responses],
            "ranks": list(row.ranks),
            "response_keys": [int(key, 16) for key in keys_of(row)],
            "digests": [digest(ids) for ids in responses],
        }
        for name, value in values.items():
            self.rows[name].append(value)
        self.nested["responses"] += responses
        self.nested["context"] += context
        self.sizes.append(len(responses))

    def batch(self) -> pa.RecordBatch:
        """All of it as Arrow."""
        starts = pa.array(np.cumsum([0, *self.sizes]), pa.int32())
        known = {name: pa.array(values, SCHEMA.field(name).type) for name, values in self.rows.items()}
        for name, parts in self.nested.items():
            inner = pa.array(parts, SCHEMA.field(name).type.value_type)
            known[name] = pa.ListArray.from_arrays(starts, inner)
        return pa.RecordBatch.from_arrays([known[name] for name in SCHEMA.names], schema=SCHEMA)


def _carried_out(work: _Work, numbers: Sequence[int], processes: int) -> Iterator[int]:
    """Write shards, in this process or in others; gives their numbers as they are done."""
    if processes <= 1:
        yield from map(work.write, numbers)
        return
    # A forked process starts at once; on the other systems forking is not safe, or not there.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(work,)) as pool:
        try:
            for done in as_completed([pool.submit(_write, number) for number in numbers]):
                yield done.result()
        finally:  # after an error or Ctrl-C nothing that waits shall begin any more
            pool.shutdown(cancel_futures=True)


_work: list[_Work] = []  # of this process, where it is one of a pool


def _begin(work: _Work) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C stops the parent, which stops these
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _work[:] = [work]


def _write(number: int) -> int:
    return _work[0].write(number)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"rows-{number:05d}.arrow"


def _join(folder: Path, count: int) -> None:
    """One file of all shards, one record batch each; the shards are removed when it is there."""
    shards = [_shard(folder, number) for number in range(count)]
    with atomic_file(folder / ENCODED) as file, pa.ipc.new_file(file, SCHEMA) as writer:
        for shard in shards:
            with pa.memory_map(str(shard)) as source:
                writer.write_batch(pa.ipc.open_file(source).get_batch(0))
    for shard in shards:
        shard.unlink()


class EncodedFile:
    """What :func:`write_encoded` wrote, through a memory map: the system keeps of it in memory what is in use.

    Args:
        path: Of ``encoded.arrow``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self._batches: dict[tuple[str, int], tuple[np.ndarray, ...]] = {}

    def __reduce__(self) -> tuple[type["EncodedFile"], tuple[Path]]:
        return EncodedFile, (self.path,)  # a mapped file does not travel to another process

    def __len__(self) -> int:
        return sum(batch.num_rows for batch in self._all())

    def column(self, name: str) -> np.ndarray:
        """One number of each comparison, or of each of its responses, laid end to end."""
        kind = SCHEMA.field(name).type
        flat = np.dtype((kind.value_type if pa.types.is_list(kind) else kind).to_pandas_dtype())
        parts = [_flat(batch.column(name)) for batch in self._all()]
        return np.concatenate(parts) if parts else np.zeros(0, flat)

    def starts(self, name: str = "lengths") -> np.ndarray:
        """Where the numbers of each comparison begin in :meth:`column`.  -> [comparisons + 1] int64"""
        sizes = [np.diff(_offsets(batch.column(name))) for batch in self._all()]
        return np.cumsum(np.concatenate([np.zeros(1, np.int64), *sizes]))

    def first_with(self, note: int) -> int | None:
        """Number of the first comparison with a note, of its prompt or of a response; None where none has it."""
        noted = np.flatnonzero(self.column("notes") & int(note))
        return int(np.searchsorted(self.starts(), noted[0], side="right")) - 1 if len(noted) else None

    def prompt(self, row: int) -> list[int]:
        """Ids of the prompt of a comparison, given its number in the file."""
        return self._ids("prompt", row)

    def opening(self, row: int) -> list[int]:
        """What follows the prompt when the model generates."""
        return self._ids("opening", row)

    def response(self, row: int, place: int) -> list[int]:
        """Ids of a response, given the number of its comparison and its place there."""
        return self._nested("responses", row, place)

    def context(self, row: int, place: int) -> list[Insert]:
        """What stands in a response beside its own tokens."""
        return _unpacked(self._nested("context", row, place))

    def _ids(self, name: str, row: int) -> list[int]:
        starts, ids = self._views(name, row // SHARD_ROWS)
        place = row % SHARD_ROWS
        return ids[starts[place] : starts[place + 1]].tolist()

    def _nested(self, name: str, row: int, place: int) -> list[int]:
        owner, starts, ids = self._views(name, row // SHARD_ROWS)
        number = owner[row % SHARD_ROWS] + place
        return ids[starts[number] : starts[number + 1]].tolist()

    def _all(self) -> Iterator[pa.RecordBatch]:
        return (self._reader.get_batch(number) for number in range(self._reader.num_record_batches))

    def _views(self, name: str, number: int) -> tuple[np.ndarray, ...]:
        """Offsets and ids of a column of a batch; they hold no copy, so all that were used stay."""
        key = name, number
        if key not in self._batches:
            column = self._reader.get_batch(number).column(name)
            nested = name in _NESTED
            inner = (_offsets(column.values), _flat(column.values)) if nested else (_flat(column),)
            self._batches[key] = (_offsets(column), *inner)
        return self._batches[key]


def _flat(column: pa.Array) -> np.ndarray:
    values = column.values if isinstance(column, pa.ListArray) else column
    return values.to_numpy(zero_copy_only=True)


def _offsets(column: pa.Array) -> np.ndarray:
    return column.offsets.to_numpy(zero_copy_only=True)
