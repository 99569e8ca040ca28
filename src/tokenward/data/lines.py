"""Comparisons as JSON lines: written one at a time, read in order or by number, never held all at once."""

import json
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, overload

import numpy as np

from tokenward.types import Comparison, Message, Span

_SCANNED_BYTES = 1 << 20


def to_line(row: Comparison) -> str:
    """A comparison as one line of JSON, its end of line included."""
    record = {name: getattr(row, name) for name in row.__slots__}
    known = {name: value for name, value in record.items() if value is not None and value != ()}
    return json.dumps(known, ensure_ascii=False) + "\n"


def from_line(line: str | bytes) -> Comparison:
    """What :func:`to_line` wrote."""
    record: dict[str, Any] = json.loads(line)
    spans = record.get("spans")
    scores, turns = record.get("scores"), record.get("turns")
    return Comparison(
        key=record["key"],
        prompt=messages_of(record["prompt"]),
        responses=tuple(record["responses"]),
        ranks=tuple(record["ranks"]),
        source=record["source"],
        scores=None if scores is None else tuple(scores),
        spans=None if spans is None else tuple(tuple(Span(*span) for span in response) for response in spans),
        turns=None if turns is None else tuple(None if own is None else messages_of(own) for own in turns),
        tools=tuple(record.get("tools", ())),
    )


def messages_of(records: Iterable[Mapping[str, Any]]) -> tuple[Message, ...]:
    """Messages that were stored as JSON, whole."""
    return tuple(cast(Message, dict(record)) for record in records)


def read_comparisons(path: Path) -> Iterator[Comparison]:
    """Comparisons of a file of such lines."""
    with path.open("rb") as file:
        for line in file:
            yield from_line(line)


class ComparisonFile(Sequence[Comparison]):
    """The comparisons of a file by their number; eight bytes of each stay in memory.

    Args:
        path: Holds one of :func:`to_line` a line; it must not change while this is in use.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            size = path.stat().st_size
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        self._ends = line_ends(path)

    def __reduce__(self) -> tuple[type["ComparisonFile"], tuple[Path]]:
        return ComparisonFile, (self.path,)  # a mapped file does not travel to another process

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[Comparison]:
        return read_comparisons(self.path)

    @overload
    def __getitem__(self, index: int) -> Comparison: ...
    @overload
    def __getitem__(self, index: slice) -> list[Comparison]: ...
    def __getitem__(self, index: int | slice) -> Comparison | list[Comparison]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        start = int(self._ends[number - 1]) if number else 0
        return from_line(self._bytes[start : int(self._ends[number])])


def line_ends(path: Path) -> np.ndarray:
    """The byte after each line.  -> [lines] int64"""
    ends, before = [np.zeros(0, np.int64)], 0
    with path.open("rb") as file:
        while chunk := file.read(_SCANNED_BYTES):
            ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + before + 1)
            before += len(chunk)
    return np.concatenate(ends)
