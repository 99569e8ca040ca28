"""Comparisons as JSON lines, written and read one at a time."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

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


def line_ends(path: Path) -> np.ndarray:
    """The byte after each line.  -> [lines] int64"""
    ends, before = [np.zeros(0, np.int64)], 0
    with path.open("rb") as file:
        while chunk := file.read(_SCANNED_BYTES):
            ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + before + 1)
            before += len(chunk)
    return np.concatenate(ends)
