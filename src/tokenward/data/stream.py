"""A source to files of comparisons, row by row: what stays in memory is some tens of bytes of each row.

Which rows repeat others is known only when all have been read, so the rows wait on disk meanwhile, with a hash
of 16 bytes each in memory.
"""

import json
from array import array
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from tokenward.artifacts import atomic_file
from tokenward.data.lines import to_line
from tokenward.data.prepare import REPEATED, Dropped, Usable, notes_of, opinion, repeated
from tokenward.data.split import check_held_out, is_held_out
from tokenward.errors import UserError

FILES = ("train.jsonl", "held_out.jsonl", "dropped.jsonl")

_WAITING = "rows.jsonl.tmp"


class Written(NamedTuple):
    """What was written.

    Attributes:
        counts: ``read``, ``kept`` and the number of rows dropped for each reason, which add up to ``read``.
        notes: Responses taken out of rows that were kept, by reason.
        train: Rows of ``train.jsonl``.
        held_out: Rows of ``held_out.jsonl``.
    """

    counts: dict[str, int]
    notes: dict[str, int]
    train: int
    held_out: int


class _Seen:
    """What is remembered of each row while all are read."""

    def __init__(self) -> None:
        self.usable = array("b")
        self.held_out = array("b")  # of the usable rows, as what follows
        self.keys = array("Q")
        self.opinions = array("Q")
        self.removed = [array("i") for _ in Usable._fields[1:]]

    def add(self, row: Usable, held_out: bool) -> None:
        self.held_out.append(held_out)
        self.keys.append(int(row.comparison.key, 16))
        self.opinions.append(opinion(row.comparison))
        for column, count in zip(self.removed, row[1:], strict=True):
            column.append(count)


def write_split(folder: Path, results: Iterable[Usable | Dropped], *, held_out: float, seed: int) -> Written:
    """Write ``train.jsonl``, ``held_out.jsonl`` and ``dropped.jsonl``, rows in the source's order.

    Args:
        folder: Where the files go; each is there whole or not at all.
        results: The rows, as :func:`tokenward.data.prepare.read` gives them.
        held_out: As :func:`tokenward.data.split.split` takes it.
        seed: So too.

    Raises:
        UserError: no row is left to train on, or what reading raises.
    """
    check_held_out(held_out)
    waiting = folder / _WAITING
    try:
        with waiting.open("wb") as file:
            seen = _read(results, file, held_out, seed)
        verdicts = repeated(np.array(seen.keys, np.uint64), np.array(seen.opinions, np.uint64))
        with waiting.open("rb") as file:
            return _write(folder, file, seen, verdicts, held_out)
    finally:
        waiting.unlink(missing_ok=True)


def _read(results: Iterable[Usable | Dropped], file: BinaryIO, held_out: float, seed: int) -> _Seen:
    seen = _Seen()
    for row in results:
        seen.usable.append(isinstance(row, Usable))
        if isinstance(row, Usable):
            seen.add(row, is_held_out(row.comparison, held_out, seed))
            file.write(to_line(row.comparison).encode())
        else:
            file.write(_dropped_line(row))
    return seen


def _dropped_line(row: Dropped) -> bytes:
    return (json.dumps(row._asdict(), ensure_ascii=False) + "\n").encode()


def _write(
    folder: Path, waiting: Iterable[bytes], seen: _Seen, verdicts: np.ndarray, held_out: float
) -> Written:
    kept, aside = verdicts == 0, np.array(seen.held_out, bool)
    train = int((kept & ~aside).sum())
    reasons: Counter[str] = Counter()
    with ExitStack() as stack:
        files = [stack.enter_context(atomic_file(folder / name)) for name in FILES]
        number = 0
        for line, usable in zip(waiting, seen.usable, strict=True):
            if not usable:
                reasons[json.loads(line)["reason"]] += 1
                files[2].write(line)
                continue
            if reason := REPEATED[verdicts[number]]:
                reasons[reason] += 1
                files[2].write(_dropped_line(Dropped(json.loads(line)["source"], reason)))
            else:
                files[1 if aside[number] else 0].write(line)
            number += 1
        counts = {"read": len(seen.usable), "kept": int(kept.sum()), **reasons}
        if not train:
            raise UserError(
                f"no comparison is left to train on: {counts}. Lower data.held_out (now {held_out}) or "
                "give more data."
            )
    notes = notes_of(*(int(np.array(removed)[kept].sum()) for removed in seen.removed))
    return Written(counts, notes, train, int(kept.sum()) - train)
