"""Writes a source to files of comparisons, row by row, with a few dozen bytes per row in memory.

Which rows are repeated is known only after all have been read. Until then the rows wait on disk, with 16 bytes of hashes
each in memory, and 24 if there is a separate eval source.
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
"""Reason to drop a row of a separate eval source."""

_REASONS = (*REPEATED, PROMPT_TRAINS)
_ROWS_PER_LOOK = 4096


class DataCounts(NamedTuple):
    """What was written."""

    # read, kept, and the number of dropped rows for each reason. The latter add up to read.
    counts: dict[str, int]
    notes: dict[str, int]  # number of responses removed from rows that were kept, by reason
    train: int  # rows of train.jsonl
    eval: int  # rows of eval.jsonl
    # For train and eval, the number of rows with a single response, labelled good or bad.
    unpaired: dict[str, int]
    evaluation: dict[str, int]  # like counts, for a separate eval source; empty without one


class _Part:
    """The rows of one source, which are written to the file ``waiting``, and what must be remembered of each.

    ``usable`` has an entry per row, all other arrays one per usable row. ``reasons`` are positions in ``_REASONS``; 0 is
    for rows that are kept.
    """

    def __init__(
        self,
        waiting: Path,
        results: Iterable[Usable | Dropped],
        is_eval: Callable[[Comparison], bool],
        *,
        prompts: bool,
    ) -> None:
        usable, eval, alone = array("b"), array("b"), array("b")
        keys, opinions, asked = array("Q"), array("Q"), array("Q")
        removed = [array("i") for _ in Usable._fields[1:]]
        with waiting.open("wb") as file:
            for row in results:
                usable.append(isinstance(row, Usable))
                if isinstance(row, Dropped):
                    file.write(_dropped_line(row))
                    continue
                comparison = row.comparison
                file.write(to_line(comparison).encode())
                eval.append(is_eval(comparison))
                alone.append(len(comparison.responses) == 1)
                keys.append(int(comparison.key, 16))
                opinions.append(opinion(comparison))
                if prompts:
                    asked.append(int(comparison_key(comparison.prompt, ()), 16))
                for column, count in zip(removed, row[1:], strict=True):
                    column.append(count)
        self.waiting = waiting
        self.usable, self.eval, self.alone = (np.frombuffer(found, bool) for found in (usable, eval, alone))
        self._prompts = np.frombuffer(asked, np.uint64)
        self._removed = [np.frombuffer(column, np.int32) for column in removed]
        self.reasons = repeated(np.frombuffer(keys, np.uint64), np.frombuffer(opinions, np.uint64))

    @property
    def kept(self) -> np.ndarray:
        return self.reasons == 0

    @property
    def removed(self) -> list[int]:
        """Number of responses that were removed from the rows that are kept, for each reason."""
        return [int(column[self.kept].sum()) for column in self._removed]

    def drop_prompts_of(self, train: "_Part") -> None:
        leaks = np.isin(self._prompts, train._prompts[train.kept]) & self.kept
        self.reasons = np.where(leaks, _REASONS.index(PROMPT_TRAINS), self.reasons)

    def rows(self) -> Iterator[tuple[str, bytes, bool]]:
        """For each row the reason to drop it (or an empty one), its line, and whether it is an eval row."""
        number = 0
        with self.waiting.open("rb") as file:
            for line, usable in zip(file, self.usable, strict=True):
                if not usable:
                    yield json.loads(line)["reason"], line, False
                    continue
                reason = _REASONS[self.reasons[number]]
                if reason:
                    line = _dropped_line(Dropped(json.loads(line)["source"], reason))
                yield reason, line, bool(self.eval[number])
                number += 1


def write_split(
    folder: Path,
    results: Iterable[Usable | Dropped],
    *,
    share: float,
    seed: int,
    evaluation: Iterable[Usable | Dropped] | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> DataCounts:
    """Write ``train.jsonl``, ``eval.jsonl`` and ``dropped.jsonl``, with the rows in the order of the source.

    Args:
        folder: Folder of the files. Each is written completely or not at all.
        results: The rows, from :func:`tokenward.data.prepare.read`.
        share: Share of eval rows, in [0, 1).
        seed: Seed of the split.
        evaluation: More eval rows. Those whose prompt is in ``train.jsonl`` are dropped.
        progress: Called while the files are written, after all rows have been read: with the numbers of rows written and of
            all.

    Raises:
        UserError: No row is left to train on, or the rows cannot be read.
    """
    check_eval_share(share)
    waiting = [folder / f"{name}.tmp" for name in ("rows.jsonl", "evaluation.jsonl")]
    try:
        split, separate = (lambda row: is_eval(row, share, seed)), evaluation is not None
        parts = [_Part(waiting[0], results, split, prompts=separate)]
        if evaluation is not None:
            parts.append(_Part(waiting[1], evaluation, lambda row: True, prompts=True))
            parts[1].drop_prompts_of(parts[0])
        return _write(folder, parts, share, progress)
    finally:
        for path in waiting:
            path.unlink(missing_ok=True)


def _dropped_line(row: Dropped) -> bytes:
    return (json.dumps(row._asdict(), ensure_ascii=False) + "\n").encode()


def _write(
    folder: Path, parts: Sequence[_Part], share: float, progress: Callable[[int, int], object]
) -> DataCounts:
    counted: list[dict[str, int]] = []
    firsts: dict[str, str] = {}
    written, total = 0, sum(len(part.usable) for part in parts)
    with ExitStack() as stack:
        files = [stack.enter_context(atomic_file(folder / name)) for name in FILES]
        for part in parts:
            reasons: Counter[str] = Counter()
            for reason, line, is_eval in part.rows():
                files[2 if reason else int(is_eval)].write(line)
                written += 1
                if not written % _ROWS_PER_LOOK:
                    progress(written, total)
                if reason:
                    reasons[reason] += 1
                    firsts.setdefault(reason, json.loads(line)["where"])
            counted.append({"read": len(part.usable), "kept": int(part.kept.sum()), **reasons})
        eval = np.concatenate([part.eval[part.kept] for part in parts])
        alone = np.concatenate([part.alone[part.kept] for part in parts])
        if eval.all():
            raise _nothing_left(counted[0], firsts, share)
    notes = notes_of(*map(sum, zip(*(part.removed for part in parts), strict=True)))
    unpaired = {"train": int((alone & ~eval).sum()), "eval": int((alone & eval).sum())}
    evaluation = counted[1] if len(counted) > 1 else {}
    return DataCounts(counted[0], notes, int((~eval).sum()), int(eval.sum()), unpaired, evaluation)


def _nothing_left(counts: dict[str, int], firsts: dict[str, str], share: float) -> UserError:
    if counts["kept"]:
        return UserError(
            f"no comparison is left to train on: all {counts['kept']} are eval rows, because their share is {share}. "
            "Lower it, or use more data.",
            code="no-rows",
            key="data.eval",
        )
    reasons = [f"  {reason}: {counts[reason]}, the first is {where}" for reason, where in firsts.items()]
    head = f"no comparison is left to train on: all {counts['read']} rows were dropped."
    return UserError(
        "\n".join([head, *reasons, "Fix the rows, or use others."]), code="no-rows", key="data.source"
    )
