"""A source to files of comparisons, row by row: what stays in memory is some tens of bytes of each row.

Which rows repeat others is known only when all have been read, so the rows wait on disk meanwhile, with hashes of 24
bytes each in memory.
"""

import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokenward.artifacts import atomic_file
from tokenward.data.files import to_line
from tokenward.data.prepare import REPEATED, Dropped, Usable, comparison_key, notes_of, opinion, repeated
from tokenward.data.split import check_eval_share, is_eval
from tokenward.errors import UserError
from tokenward.types import Comparison

FILES = ("train.jsonl", "eval.jsonl", "dropped.jsonl")

PROMPT_TRAINS = "prompt also in the training rows"
"""Why a row of another source is not evaluated on."""


class DataCounts(NamedTuple):
    """What was written.

    Attributes:
        counts: ``read``, ``kept`` and the number of rows dropped for each reason, which add up to ``read``.
        notes: Responses taken out of rows that were kept, by reason.
        train: Rows of ``train.jsonl``.
        eval: Rows of ``eval.jsonl``.
        unpaired: How many rows of both have one response, which is good or bad by itself: ``train``, ``eval``.
        evaluation: As ``counts``, of the rows that have a source of their own to be held out; empty without one.
    """

    counts: dict[str, int]
    notes: dict[str, int]
    train: int
    eval: int
    unpaired: dict[str, int]
    evaluation: dict[str, int]


class _Seen:
    """What is remembered of each row while all are read."""

    def __init__(self) -> None:
        self.usable = array("b")
        self.eval = array("b")  # of the usable rows, as what follows
        self.alone = array("b")
        self.keys = array("Q")
        self.opinions = array("Q")
        self.prompts = array("Q")
        self.removed = [array("i") for _ in Usable._fields[1:]]

    def add(self, row: Usable, eval: bool) -> None:
        self.eval.append(eval)
        self.alone.append(len(row.comparison.responses) == 1)
        self.keys.append(int(row.comparison.key, 16))
        self.opinions.append(opinion(row.comparison))
        self.prompts.append(int(comparison_key(row.comparison.prompt, ()), 16))
        for column, count in zip(self.removed, row[1:], strict=True):
            column.append(count)


class _Part(NamedTuple):
    """The rows of one source, all read.

    Attributes:
        waiting: File of the rows.
        seen: What is remembered of them.
        reasons: ``[usable rows]``, why each is dropped, as a place in :data:`_REASONS`; 0 where it is kept.
    """

    waiting: Path
    seen: _Seen
    reasons: np.ndarray

    @property
    def kept(self) -> np.ndarray:
        """Which usable rows stay.  -> [usable rows] bool"""
        return self.reasons == 0

    def count(self, eval: bool, *, alone: bool = False) -> int:
        """How many rows stay on one side, or how many of one response."""
        found = self.kept & (np.array(self.seen.eval, bool) == eval)
        return int((found & np.array(self.seen.alone, bool) if alone else found).sum())

    def removed(self) -> list[int]:
        """How many responses were taken out of the rows that stay, for each reason."""
        return [int(np.array(removed)[self.kept].sum()) for removed in self.seen.removed]

    def rows(self) -> Iterator[tuple[str, bytes, bool]]:
        """Of each row why it is dropped, or nothing, its line, and whether it is held out."""
        number = 0
        with self.waiting.open("rb") as file:
            for line, usable in zip(file, self.seen.usable, strict=True):
                if not usable:
                    yield json.loads(line)["reason"], line, False
                    continue
                reason = _REASONS[self.reasons[number]]
                if reason:
                    line = _dropped_line(Dropped(json.loads(line)["source"], reason))
                yield reason, line, bool(self.seen.eval[number])
                number += 1


_REASONS = (*REPEATED, PROMPT_TRAINS)


def write_split(
    folder: Path,
    results: Iterable[Usable | Dropped],
    *,
    share: float,
    seed: int,
    evaluation: Iterable[Usable | Dropped] | None = None,
) -> DataCounts:
    """Write ``train.jsonl``, ``eval.jsonl`` and ``dropped.jsonl``, rows in the source's order.

    Args:
        folder: Where the files go; each is there whole or not at all.
        results: The rows, as :func:`tokenward.data.prepare.read` gives them.
        share: As :func:`tokenward.data.split.split` takes it.
        seed: So too.
        evaluation: Further rows to hold out; those whose prompt is in ``train.jsonl`` are dropped.

    Raises:
        UserError: no row is left to train on, or what reading raises.
    """
    check_eval_share(share)
    waiting = [folder / f"{name}.tmp" for name in ("rows.jsonl", "evaluation.jsonl")]
    try:
        part = _read(results, waiting[0], lambda row: is_eval(row, share, seed))
        parts = [part]
        if evaluation is not None:
            parts.append(_without_prompts(_read(evaluation, waiting[1], lambda row: True), part))
        return _write(folder, parts, share)
    finally:
        for path in waiting:
            path.unlink(missing_ok=True)


def _read(results: Iterable[Usable | Dropped], waiting: Path, side: Callable[[Comparison], bool]) -> _Part:
    seen = _Seen()
    with waiting.open("wb") as file:
        for row in results:
            seen.usable.append(isinstance(row, Usable))
            if isinstance(row, Usable):
                seen.add(row, side(row.comparison))
                file.write(to_line(row.comparison).encode())
            else:
                file.write(_dropped_line(row))
    verdicts = repeated(np.array(seen.keys, np.uint64), np.array(seen.opinions, np.uint64))
    return _Part(waiting, seen, verdicts)


def _without_prompts(part: _Part, train: _Part) -> _Part:
    """A source's rows without those whose prompt is trained on."""
    trained = np.array(train.seen.prompts, np.uint64)[train.kept]
    leaks = np.isin(np.array(part.seen.prompts, np.uint64), trained) & part.kept
    return part._replace(reasons=np.where(leaks, _REASONS.index(PROMPT_TRAINS), part.reasons))


def _dropped_line(row: Dropped) -> bytes:
    return (json.dumps(row._asdict(), ensure_ascii=False) + "\n").encode()


def _write(folder: Path, parts: Sequence[_Part], share: float) -> DataCounts:
    counted: list[dict[str, int]] = []
    firsts: dict[str, str] = {}
    train, aside = parts[0].count(False), sum(part.count(True) for part in parts)
    with ExitStack() as stack:
        files = [stack.enter_context(atomic_file(folder / name)) for name in FILES]
        for part in parts:
            reasons: Counter[str] = Counter()
            for reason, line, held in part.rows():
                files[2 if reason else int(held)].write(line)
                if reason:
                    reasons[reason] += 1
                    firsts.setdefault(reason, json.loads(line)["where"])
            counted.append({"read": len(part.seen.usable), "kept": int(part.kept.sum()), **reasons})
        if not train:
            raise UserError(_nothing_left(counted[0], firsts, share))
    sides = {"train": False, "eval": True}
    unpaired = {name: sum(part.count(side, alone=True) for part in parts) for name, side in sides.items()}
    evaluation = counted[1] if len(counted) > 1 else {}
    notes = notes_of(*map(sum, zip(*(part.removed() for part in parts), strict=True)))
    return DataCounts(counted[0], notes, train, aside, unpaired, evaluation)


def _nothing_left(counts: dict[str, int], firsts: dict[str, str], share: float) -> str:
    """Why nothing trains, and what would help: all rows were dropped, or all are held out."""
    if counts["kept"]:
        return (
            f"no comparison is left to train on: all {counts['kept']} are held out by data.eval {share}. Lower it, or "
            "give more data."
        )
    reasons = [f"  {reason}: {counts[reason]}, the first is {where}" for reason, where in firsts.items()]
    head = f"no comparison is left to train on: of {counts['read']} rows every one was dropped."
    return "\n".join([head, *reasons, "Mend the rows, or give others."])
