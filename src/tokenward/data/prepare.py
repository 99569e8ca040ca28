"""From rows to comparisons. Malformed rows are errors; rows without information are dropped and counted by reason."""

import hashlib
import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenward.data.fields import FieldError, Row, Unusable
from tokenward.data.files import Meter
from tokenward.data.formats import (
    IN_MEMORY,
    IN_RECIPE,
    Format,
    check_columns,
    find,
    renamed,
    usual_columns,
)
from tokenward.data.messages import trains
from tokenward.data.parsers import Parsed, PromptAndTools, asked_of, dense, with_row_wide
from tokenward.data.sources import numbered, rows
from tokenward.errors import UserError
from tokenward.types import Comparison, Message

_SHOWN_ERRORS = 5
_COMPACT = json.JSONEncoder(separators=(",", ":"))


class Dropped(NamedTuple):
    """A row that was left out, and why."""

    where: str
    reason: str


class Usable(NamedTuple):
    """A usable row, how many responses were removed from it for each reason, and whether its scores contradict its ranks."""

    comparison: Comparison
    empty_removed: int
    identical_removed: int
    weightless_removed: int = 0
    contradicted: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A source that was read completely."""

    comparisons: list[Comparison]  # the rows that were kept, in the order of the source
    # read, kept, and the number of dropped rows for each reason. The latter add up to read.
    counts: dict[str, int]
    dropped: list[Dropped]  # the rows that were dropped, in the order of the source
    notes: dict[str, int]  # what was noticed in rows that were kept, see notes_of
    format: str  # name of the format
    unread: list[str]  # columns that were not read


@dataclass(slots=True)
class Reading:
    """A source that is being read. All attributes but ``rows`` are complete once the rows have been consumed."""

    rows: Iterator[Usable | Dropped]  # the rows, one at a time. Repeated rows are still among them
    # Names of the formats; files of a list can have different ones.
    formats: list[str] = field(default_factory=list[str])
    unread: list[str] = field(default_factory=list[str])  # columns that were not read
    said: list[str] = field(default_factory=list[str])  # lines for the user, such as which split is read
    meter: Meter = field(default_factory=Meter)  # how far the files have been read

    @property
    def format(self) -> str:
        """The names of the formats, joined."""
        return ", ".join(self.formats)

    def note_unread(self, row: Row, known: Set[str]) -> None:
        """Add the columns of a row that are not among the known ones."""
        if not row.keys() <= known:
            self.unread += [str(name) for name in row if name not in known and name not in self.unread]


def load(source: str | Path | Sequence[str | Path], **options: Any) -> Loaded:
    """Read a source of preferences in any format. Arguments and errors are those of :func:`read`."""
    return _loaded(read(source, **options))


def read(
    source: str | Path | Sequence[str | Path],
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    subset: str | None = None,
    limit: int | None = None,
) -> Reading:
    """Read a source of preferences in any format, one row at a time.

    Args:
        source: A file, a glob pattern, a folder, a hub name ``owner/name``, or a list of these.
        format: The row format. ``auto`` detects it from the columns and the first row of each item of a list.
        columns: Maps tokenward's column names to those of the source, where they differ.
        split: The split to read.
        subset: A folder inside the source, or the configuration of a hub data set.
        limit: Read at most this many rows.

    Raises:
        UserError: The source cannot be read, its format is unknown, or it has malformed rows (the first five are
            named, with the total). Raised while the rows are consumed; malformed rows at the end.
    """
    if limit is not None and limit < 1:
        raise UserError(
            f"limit must be at least 1, got {limit}. Leave it out to read all rows.",
            code="out-of-range",
            key="data.limit",
        )
    parts = [source] if isinstance(source, str | Path) else list(source)
    reading = Reading(iter(()))
    found = [
        rows(part, split=split, subset=subset, say=reading.said.append, meter=reading.meter) for part in parts
    ]
    reading.rows = _read_all(reading, source, found, _Options(format, columns or {}, limit))
    return reading


def from_rows(
    given: Iterable[Row], *, name: str, format: str = "auto", columns: Mapping[str, str] | None = None
) -> Loaded:
    """Rows in memory as comparisons. ``name`` stands for the source in errors; the rest is as for :func:`read`."""
    reading = Reading(iter(()))
    options = _Options(format, columns or {}, None, IN_MEMORY)
    reading.rows = _read_all(reading, name, [numbered(name, given)], options)
    return _loaded(reading)


def asked(where: str, row: Row) -> PromptAndTools:
    """The prompt of a row, whose responses are not read, and its tools.

    Raises:
        UserError: Its prompt is missing, malformed or empty.
    """
    try:
        found = asked_of(row)
    except FieldError as error:
        raise UserError(f"{where}: {error}. Correct or delete this row.", code="bad-row") from error
    if not any(message["content"].strip() for message in found.prompt if message["role"] != "system"):
        raise UserError(f"{where}: the prompt is empty. Correct or delete this row.", code="bad-row")
    return found


def comparison_key(
    prompt: Iterable[Message],
    responses: Iterable[str],
    *,
    turns: Sequence[Sequence[Message] | None] | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The stable name of a comparison: 16 hexadecimal digits of a hash of prompt and responses.

    The order of the responses does not matter: a row and the same row with the opposite preference share the key.

    Args:
        prompt: Its messages.
        responses: Their texts.
        turns: See :class:`tokenward.types.Comparison`.
        tools: See :class:`tokenward.types.Comparison`.
    """
    named = sorted(reply_names(list(responses), turns))
    content: list[Any] = [[_message_name(message) for message in prompt], named]
    content += [json.dumps(list(tools), sort_keys=True)] if tools else []
    return hashlib.sha256(_COMPACT.encode(content).encode()).hexdigest()[:16]


def reply_names(texts: Sequence[str], turns: Sequence[Sequence[Message] | None] | None) -> list[str]:
    """An identifier for each response: its text, or its messages if they contain more than the text."""
    if turns is None:
        return list(texts)
    return [
        text if own is None else json.dumps([_message_name(message) for message in own])
        for text, own in zip(texts, turns or [None] * len(texts), strict=True)
    ]


def _message_name(message: Message) -> list[Any]:
    if len(message) == 2:
        return [message["role"], message["content"]]
    more = {key: value for key, value in message.items() if key not in ("role", "content")}
    return [message["role"], message["content"], *([json.dumps(more, sort_keys=True)] if more else [])]


def whole_turns(
    turns: Sequence[tuple[Message, ...] | None],
) -> tuple[tuple[Message, ...] | None, ...] | None:
    """The messages of some responses; None if each response is just a text."""
    return None if all(own is None for own in turns) else tuple(turns)


def with_responses(
    row: Parsed | Comparison, places: Sequence[int], ranks: tuple[int, ...], source: str
) -> Comparison:
    """The comparison of some responses of a row, given by their positions."""
    responses = tuple(row.responses[place] for place in places)
    turns = None if row.turns is None else whole_turns([row.turns[place] for place in places])
    # The key does not depend on the order of the responses.
    known = row.key if isinstance(row, Comparison) and len({*places}) == len(row.responses) else None
    return Comparison(
        key=known or comparison_key(row.prompt, responses, turns=turns, tools=row.tools),
        prompt=row.prompt,
        responses=responses,
        ranks=ranks,
        source=source,
        scores=None if row.scores is None else tuple(row.scores[place] for place in places),
        spans=None if row.spans is None else tuple(row.spans[place] for place in places),
        turns=turns,
        tools=row.tools,
    )


class _Options(NamedTuple):
    format: str
    columns: Mapping[str, str]
    limit: int | None
    rename: str = IN_RECIPE


class _Faults:
    """Malformed rows: the first few, and how many there are."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.count = 0
        self.shapes: dict[str, None] = {}

    def add(self, where: str, error: FieldError, shape: Format, columns: Mapping[str, str]) -> None:
        self.count += 1
        self.shapes[f"{shape.name} ({', '.join(shape.needs)})"] = None
        if self.count <= _SHOWN_ERRORS:
            self.lines.append(f"  {where}: {_renamed_field(error.field, columns)}: {error.problem}")

    def error(self) -> UserError:
        more = [f"  and {self.count - len(self.lines)} more"] if self.count > len(self.lines) else []
        rows_cannot = "1 row cannot" if self.count == 1 else f"{self.count} rows cannot"
        head = f"{rows_cannot} be read as {', '.join(self.shapes)}. Fix or delete them:"
        return UserError("\n".join([head, *self.lines, *more]), code="malformed-rows")


def _read_all(
    reading: Reading, source: object, parts: Sequence[Iterator[tuple[str, Row]]], wanted: _Options
) -> Iterator[Usable | Dropped]:
    """Every row as usable or dropped. After a malformed row, the others are only read to count the malformed ones."""
    faults, count, shape = _Faults(), 0, None
    for part in parts:
        numbered = islice(part, None if wanted.limit is None else wanted.limit - count)
        first = next(numbered, None)
        if first is None:
            continue
        shape, columns = _shape(first, wanted, shape)
        reading.formats += [shape.name] if shape.name not in reading.formats else []
        known = {columns.get(name, name) for name in shape.reads}
        for where, row in chain([first], numbered):
            count += 1
            reading.note_unread(row, known)
            try:
                result = _result(row, where, shape, columns)
            except FieldError as error:
                faults.add(where, error, shape, columns)
                continue
            if not faults.count:
                yield result
    if not count:
        raise UserError(f"{source}: contains no rows.", code="no-rows", key="data.source")
    if faults.count:
        raise faults.error()


def _shape(
    first: tuple[str, Row], wanted: _Options, before: Format | None
) -> tuple[Format, Mapping[str, str]]:
    """The format of a part (that of the previous part, if it has its columns) and the mapping of column names."""
    where, row = first
    try:
        check_columns(wanted.columns, list(row))
        columns = usual_columns(wanted.columns, list(row)) if wanted.format == "auto" else wanted.columns
        named = renamed(row, columns)
        if before is not None and not before.missing(named):
            return before, columns
        return find(wanted.format, list(named), named, wanted.rename), columns
    except UserError as error:
        raise error.within(where) from error


def _result(row: Row, where: str, shape: Format, columns: Mapping[str, str]) -> Usable | Dropped:
    named = renamed(row, columns)
    try:
        return _usable(with_row_wide(shape.parse(named), named), where)
    except Unusable as reason:
        return Dropped(where, str(reason))


def _renamed_field(field: str, columns: Mapping[str, str]) -> str:
    for name, column in columns.items():
        if field == name or field.startswith(f"{name}["):
            return f"{field} (column {column})"
    return field


def _usable(parsed: Parsed, where: str) -> Usable:
    least = 1 if parsed.alone else 2
    if len(parsed.responses) < least:
        raise Unusable("fewer than two responses")
    if not any(_is_question(message) for message in parsed.prompt):
        raise Unusable("empty prompt")
    filled = [place for place, response in enumerate(parsed.responses) if response.strip()]
    if len(filled) < least:
        raise Unusable("empty response")
    turns = parsed.turns or (None,) * len(parsed.responses)
    trained = [place for place in filled if (own := turns[place]) is None or trains(own)]
    if len(trained) < least:
        raise Unusable("response of weight 0")
    distinct = _distinct(parsed, trained)
    if len(distinct) < least:
        raise Unusable("identical responses")
    ranks = tuple(parsed.ranks[place] for place in distinct)
    if not parsed.alone and len(set(ranks)) < 2:
        raise Unusable("all ranks tied")
    removed = len(parsed.responses) - len(filled), len(trained) - len(distinct), len(filled) - len(trained)
    comparison = with_responses(parsed, distinct, ranks if parsed.alone else dense(ranks), where)
    return Usable(comparison, *removed, int(_scores_contradict(comparison)))


def _scores_contradict(row: Comparison) -> bool:
    """Whether a response has a higher score than one that is ranked before it. The ranks are what trains."""
    if row.scores is None:
        return False
    given = [*zip(row.ranks, row.scores, strict=True)]
    return any(rank < other and score < more for rank, score in given for other, more in given)


def _is_question(message: Message) -> bool:
    return message["role"] != "system" and bool(message["content"].strip() or message.get("tool_calls"))


def _distinct(parsed: Parsed, places: Sequence[int]) -> list[int]:
    """The first of identical responses if their ranks agree, none of them if they do not."""
    names = reply_names(parsed.responses, parsed.turns)
    if len({names[place] for place in places}) == len(places):
        return list(places)
    same: defaultdict[str, list[int]] = defaultdict(list)
    for place in places:
        same[names[place]].append(place)
    return sorted(group[0] for group in same.values() if len({parsed.ranks[place] for place in group}) == 1)


def _loaded(reading: Reading) -> Loaded:
    results = list(reading.rows)
    usable = [row for row in results if isinstance(row, Usable)]
    keys = np.array([int(row.comparison.key, 16) for row in usable], np.uint64)
    opinions = np.array([opinion(row.comparison) for row in usable], np.uint64)
    verdicts = iter(repeated(keys, opinions))
    kept: list[Usable] = []
    dropped: list[Dropped] = []
    for result in results:
        if isinstance(result, Dropped):
            dropped.append(result)
        elif reason := REPEATED[next(verdicts)]:
            dropped.append(Dropped(result.comparison.source, reason))
        else:
            kept.append(result)
    return Loaded(
        comparisons=[row.comparison for row in kept],
        counts={"read": len(results), "kept": len(kept), **Counter(drop.reason for drop in dropped)},
        dropped=dropped,
        notes=notes_of(*(sum(column) for column in zip(*(row[1:] for row in kept), strict=True))),
        format=reading.format,
        unread=reading.unread,
    )


def notes_of(
    empty: int = 0, identical: int = 0, weightless: int = 0, contradicted: int = 0
) -> dict[str, int]:
    """Of rows that were kept: responses removed, by reason, and rows whose scores contradict their ranks. Zeros are left out."""
    notes = {
        "empty response removed": empty,
        "identical response removed": identical,
        "response of weight 0 removed": weightless,
        "scores contradict the ranks, which are used": contradicted,
    }
    return {reason: count for reason, count in notes.items() if count}


def opinion(comparison: Comparison) -> int:
    """A 64-bit hash of the rank of each response, to be compared among comparisons with one key.

    The order of the responses does not matter.
    """
    names = reply_names(comparison.responses, comparison.turns)
    ranked = array("q", [rank for _, rank in sorted(zip(names, comparison.ranks, strict=True))])
    return int.from_bytes(hashlib.blake2b(ranked, digest_size=8).digest())


REPEATED = ("", "duplicate", "contradictory")
"""The reasons that :func:`repeated` returns the positions of."""


def repeated(keys: np.ndarray, opinions: np.ndarray) -> np.ndarray:
    """Which comparisons repeat the prompt and responses of another.  [rows] each -> [rows] int8

    All rows are judged together, so their order changes no count: if opinions differ, all are dropped, otherwise all
    but the first.

    Args:
        keys: Keys of the comparisons, uint64.
        opinions: Values of :func:`opinion`, uint64.

    Returns:
        Positions in :data:`REPEATED`.
    """
    order = np.argsort(keys, kind="stable")
    sorted_keys, sorted_opinions = keys[order], opinions[order]
    first = np.ones(len(keys), bool)
    first[1:] = sorted_keys[1:] != sorted_keys[:-1]
    group = np.cumsum(first) - 1
    differs = sorted_opinions != sorted_opinions[first][group]
    disputed = np.zeros(int(first.sum()), bool)
    disputed[group[differs]] = True
    verdicts = np.empty(len(keys), np.int8)
    verdicts[order] = np.where(disputed[group], 2, np.where(first, 0, 1))
    return verdicts
