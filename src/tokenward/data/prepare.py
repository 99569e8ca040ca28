"""Rows in, comparisons out: what is malformed stops the run, what teaches nothing is counted by reason."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenward.data.fields import FieldError, Row, Unusable
from tokenward.data.formats import Format, check_columns, find, renamed, usual_columns
from tokenward.data.messages import trains
from tokenward.data.parsers import Parsed, dense, with_row_wide
from tokenward.data.sources import numbered, rows
from tokenward.errors import UserError
from tokenward.types import Comparison, Message

_SHOWN_ERRORS = 5


class Dropped(NamedTuple):
    """A row left out, and why."""

    where: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What a source gave.

    Attributes:
        comparisons: The rows kept, in the source's order.
        counts: ``read``, ``kept`` and the number of rows dropped for each reason, which add up to ``read``.
        dropped: The rows dropped, in the source's order.
        notes: Responses taken out of rows that were kept, by reason.
        format: The name of the format the rows were read as.
        unread: Columns of the source that were not read.
    """

    comparisons: list[Comparison]
    counts: dict[str, int]
    dropped: list[Dropped]
    notes: dict[str, int]
    format: str
    unread: list[str] = field(default_factory=list[str])


class Usable(NamedTuple):
    """A row that can be learned from, and how many responses were taken out of it, by reason."""

    comparison: Comparison
    empty_removed: int
    identical_removed: int
    weightless_removed: int = 0


@dataclass(slots=True)
class Reading:
    """A source that is being read, and what is known of it once its rows have been.

    Attributes:
        rows: The rows one after the other; repeated ones are still among them.
        formats: Names of the formats that they were read as.
        unread: Columns that no part of the source's format reads.
        said: What the user should know of where the rows came from.
    """

    rows: Iterator[Usable | Dropped]
    formats: list[str] = field(default_factory=list[str])
    unread: list[str] = field(default_factory=list[str])
    said: list[str] = field(default_factory=list[str])

    @property
    def format(self) -> str:
        """The formats in one word; a list of files may have several."""
        return ", ".join(self.formats)


def load(
    source: str | Path | Sequence[str | Path],
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    subset: str | None = None,
    limit: int | None = None,
) -> Loaded:
    """Read a source of preferences, whatever its shape, into comparisons.

    Args:
        source: A file, a glob pattern, a folder, a hub name ``owner/name``, or a list of these.
        format: The rows' shape; ``auto`` tells it by the columns and the first row, of each item of a list.
        columns: tokenward's name of a column to the source's, where they differ.
        split: Which split of a source with several.
        subset: A folder inside the source, or the configuration of a hub data set.
        limit: Read no more than this many rows.

    Raises:
        UserError: The source cannot be read, has no known shape, or holds malformed rows (the first five are
            named, with the total).
    """
    reading = read(source, format=format, columns=columns, split=split, subset=subset, limit=limit)
    return _loaded(list(reading.rows), reading)


def read(
    source: str | Path | Sequence[str | Path],
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    subset: str | None = None,
    limit: int | None = None,
) -> Reading:
    """The rows of a source one after the other.

    Arguments and errors are those of :func:`load`; they raise when rows are asked for, and malformed rows when all have
    been read.
    """
    if limit is not None and limit < 1:
        raise UserError(f"data.limit must be at least 1, got {limit}. Leave it out to read all rows.")
    parts = [source] if isinstance(source, str | Path) else list(source)
    reading = Reading(iter(()))
    found = [rows(part, split=split, subset=subset, say=reading.said.append) for part in parts]
    reading.rows = _read_all(reading, source, found, _Wanted(format, columns or {}, limit))
    return reading


def from_rows(
    given: Iterable[Row], *, name: str, format: str = "auto", columns: Mapping[str, str] | None = None
) -> Loaded:
    """Rows that are in memory, of any shape that :func:`load` reads, as comparisons.

    Args:
        given: One mapping per row.
        name: What messages call them.
        format: As :func:`load` takes it.
        columns: So too.

    Raises:
        UserError: as :func:`load`.
    """
    reading = Reading(iter(()))
    wanted = _Wanted(format, columns or {}, None)
    reading.rows = _read_all(reading, name, [numbered(name, given)], wanted)
    return _loaded(list(reading.rows), reading)


def comparison_key(
    prompt: Iterable[Message],
    responses: Iterable[str],
    *,
    turns: Sequence[Sequence[Message] | None] | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The stable name of a comparison: 16 hexadecimal digits of a hash of its prompt and its responses.

    The order of the responses does not matter: a row and the same row with the opposite preference share it.

    Args:
        prompt: Its messages.
        responses: Their texts.
        turns: As in :class:`tokenward.types.Comparison`.
        tools: So too.
    """
    named = sorted(reply_names(list(responses), turns))
    content: list[Any] = [[message_name(message) for message in prompt], named]
    content += [json.dumps(list(tools), sort_keys=True)] if tools else []
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()[:16]


def reply_names(texts: Sequence[str], turns: Sequence[Sequence[Message] | None] | None) -> list[str]:
    """What tells each response from others: its text, or its messages where they are more than that."""
    whole = turns or [None] * len(texts)
    return [text if own is None else messages_name(own) for text, own in zip(texts, whole, strict=True)]


def whole_turns(
    turns: Sequence[tuple[Message, ...] | None],
) -> tuple[tuple[Message, ...] | None, ...] | None:
    """Messages of some responses; None where each is one message with its text alone."""
    return None if all(own is None for own in turns) else tuple(turns)


def message_name(message: Message) -> list[Any]:
    """What tells a message from others, as JSON: its role, its content, and what else it holds."""
    more = {key: value for key, value in message.items() if key not in ("role", "content")}
    return [message["role"], message["content"], *([json.dumps(more, sort_keys=True)] if more else [])]


def messages_name(messages: Iterable[Message]) -> str:
    """So of several messages, as one text."""
    return json.dumps([message_name(message) for message in messages])


class _Wanted(NamedTuple):
    """How a source is to be read."""

    format: str
    columns: Mapping[str, str]
    limit: int | None


class _Faults:
    """Malformed rows: the first few, and how many there are."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.count = 0
        self.shapes: list[str] = []

    def add(self, where: str, error: FieldError, shape: Format, columns: Mapping[str, str]) -> None:
        self.count += 1
        named = f"{shape.name} ({', '.join(shape.needs)})"
        self.shapes += [named] if named not in self.shapes else []
        if self.count <= _SHOWN_ERRORS:
            self.lines.append(f"  {where}: {_renamed_field(error.field, columns)}: {error.problem}")

    def message(self) -> str:
        more = [f"  and {self.count - len(self.lines)} more"] if self.count > len(self.lines) else []
        rows_cannot = "1 row cannot" if self.count == 1 else f"{self.count} rows cannot"
        head = f"{rows_cannot} be read as {', '.join(self.shapes)}. Mend or delete them:"
        return "\n".join([head, *self.lines, *more])


def _read_all(
    reading: Reading, source: object, parts: Sequence[Iterator[tuple[str, Row]]], wanted: _Wanted
) -> Iterator[Usable | Dropped]:
    """Every row as usable or dropped; after a malformed one only to count how many there are."""
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
            reading.unread += [str(name) for name in row if name not in known and name not in reading.unread]
            try:
                result = _result(row, where, shape, columns)
            except FieldError as error:
                faults.add(where, error, shape, columns)
                continue
            if not faults.count:
                yield result
    if not count:
        raise UserError(f"{source}: holds no rows.")
    if faults.count:
        raise UserError(faults.message())


def _shape(
    first: tuple[str, Row], wanted: _Wanted, before: Format | None
) -> tuple[Format, Mapping[str, str]]:
    """The shape of a part, that of the part before where it has its columns, and the renaming that counts."""
    where, row = first
    try:
        check_columns(wanted.columns, list(row))
        columns = usual_columns(wanted.columns, list(row)) if wanted.format == "auto" else wanted.columns
        named = renamed(row, columns)
        if before is not None and not before.missing(named):
            return before, columns
        return find(wanted.format, list(named), named), columns
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _result(row: Row, where: str, shape: Format, columns: Mapping[str, str]) -> Usable | Dropped:
    named = renamed(row, columns)
    try:
        return _usable(with_row_wide(shape.parse(named), named), where)
    except Unusable as reason:  # well formed, but there is nothing to learn from it
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
    if not any(_asks(message) for message in parsed.prompt):
        raise Unusable("empty prompt")
    filled = [place for place, response in enumerate(parsed.responses) if response.strip()]
    if len(filled) < least:
        raise Unusable("empty response")
    trained = [place for place in filled if _trains(parsed, place)]
    if len(trained) < least:
        raise Unusable("response of weight 0")
    distinct = _distinct(parsed, trained)
    if len(distinct) < least:
        raise Unusable("identical responses")
    ranks = [parsed.ranks[place] for place in distinct]
    if not parsed.alone and len(set(ranks)) < 2:
        raise Unusable("all ranks tied")
    removed = len(parsed.responses) - len(filled), len(trained) - len(distinct), len(filled) - len(trained)
    return Usable(_comparison(parsed, distinct, where), *removed)


def _comparison(parsed: Parsed, places: Sequence[int], where: str) -> Comparison:
    """The comparison of some of a row's responses."""
    responses = tuple(parsed.responses[place] for place in places)
    ranks = tuple(parsed.ranks[place] for place in places)
    turns = None if parsed.turns is None else whole_turns([parsed.turns[place] for place in places])
    return Comparison(
        key=comparison_key(parsed.prompt, responses, turns=turns, tools=parsed.tools),
        prompt=parsed.prompt,
        responses=responses,
        ranks=ranks if parsed.alone else dense(ranks),
        source=where,
        scores=None if parsed.scores is None else tuple(parsed.scores[place] for place in places),
        spans=None if parsed.spans is None else tuple(parsed.spans[place] for place in places),
        turns=turns,
        tools=parsed.tools,
    )


def _asks(message: Message) -> bool:
    return message["role"] != "system" and bool(message["content"].strip() or message.get("tool_calls"))


def _trains(parsed: Parsed, place: int) -> bool:
    own = None if parsed.turns is None else parsed.turns[place]
    return own is None or trains(own)


def _distinct(parsed: Parsed, places: Sequence[int]) -> list[int]:
    """Of identical responses the first where their ranks agree, none where they do not."""
    names = reply_names(parsed.responses, parsed.turns)
    same: defaultdict[str, list[int]] = defaultdict(list)
    for place in places:
        same[names[place]].append(place)
    return sorted(group[0] for group in same.values() if len({parsed.ranks[place] for place in group}) == 1)


def _loaded(results: Sequence[Usable | Dropped], reading: Reading) -> Loaded:
    usable = [row for row in results if isinstance(row, Usable)]
    reasons = dict(zip(map(id, usable), _repeated([row.comparison for row in usable]), strict=True))
    kept: list[Usable] = []
    dropped: list[Dropped] = []
    for result in results:
        if isinstance(result, Dropped):
            dropped.append(result)
        elif reason := reasons[id(result)]:
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


def notes_of(empty: int = 0, identical: int = 0, weightless: int = 0) -> dict[str, int]:
    """How many responses were taken out of rows that were kept, by reason; what never happened is left out."""
    notes = {
        "empty response removed": empty,
        "identical response removed": identical,
        "response of weight 0 removed": weightless,
    }
    return {reason: count for reason, count in notes.items() if count}


def _repeated(comparisons: Sequence[Comparison]) -> list[str]:
    keys = np.array([int(comparison.key, 16) for comparison in comparisons], np.uint64)
    opinions = np.array([opinion(comparison) for comparison in comparisons], np.uint64)
    return [REPEATED[verdict] for verdict in repeated(keys, opinions)]


def opinion(comparison: Comparison) -> int:
    """Which rank each response has, as a hash of 64 bits; the order of the responses does not matter."""
    names = reply_names(comparison.responses, comparison.turns)
    ranked = sorted(zip(names, comparison.ranks, strict=True))
    return int(hashlib.sha256(json.dumps(ranked).encode()).hexdigest()[:16], 16)


REPEATED = ("", "duplicate", "contradictory")
"""What the numbers of :func:`repeated` mean."""


def repeated(keys: np.ndarray, opinions: np.ndarray) -> np.ndarray:
    """Which comparisons of the same prompt and responses as another are dropped.  [rows] each -> [rows] int8

    Judged once all are read, so that the order of the rows changes no count: where opinions differ all are
    dropped, otherwise all but the first.

    Args:
        keys: Of the comparisons, as uint64.
        opinions: What each says, from :func:`opinion`.

    Returns:
        Places in :data:`REPEATED`.
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
