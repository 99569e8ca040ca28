"""Rows in, comparisons out: what is malformed stops the run, what teaches nothing is counted by reason."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenward.data.fields import FieldError, Row, Unusable
from tokenward.data.formats import Format, check_columns, find, renamed
from tokenward.data.parsers import Parsed, dense
from tokenward.data.sources import rows
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
    """

    comparisons: list[Comparison]
    counts: dict[str, int]
    dropped: list[Dropped]
    notes: dict[str, int]
    format: str


class Usable(NamedTuple):
    """A row that can be learned from, and how many responses were taken out of it."""

    comparison: Comparison
    empty_removed: int
    identical_removed: int


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
        format: The rows' shape; ``auto`` tells it by the columns and the first row.
        columns: tokenward's name of a column to the source's, where they differ.
        split: Which split of a saved or hub data set.
        subset: The configuration of a hub data set.
        limit: Read no more than this many rows.

    Raises:
        UserError: The source cannot be read, has no known shape, or holds malformed rows (the first five are
            named, with the total).
    """
    shape, results = read(source, format=format, columns=columns, split=split, subset=subset, limit=limit)
    return _loaded(list(results), shape)


def read(
    source: str | Path | Sequence[str | Path],
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    subset: str | None = None,
    limit: int | None = None,
) -> tuple[str, Iterator[Usable | Dropped]]:
    """The name of a source's format, and its rows one after the other; repeated rows are still among them.

    Arguments and errors are those of :func:`load`. Malformed rows raise when all rows have been read.
    """
    if limit is not None and limit < 1:
        raise UserError(f"data.limit must be at least 1, got {limit}. Leave it out to read all rows.")
    numbered = islice(rows(source, split=split, subset=subset), limit)
    first = next(numbered, None)
    if first is None:
        raise UserError(f"{source}: holds no rows.")
    columns = columns or {}
    shape = _shape(first, format, columns)
    return shape.name, _read_all(chain([first], numbered), shape, columns)


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
    texts = list(responses)
    whole = turns or [None] * len(texts)
    named = [text if own is None else messages_name(own) for text, own in zip(texts, whole, strict=True)]
    content: list[Any] = [[message_name(message) for message in prompt], sorted(named)]
    content += [json.dumps(list(tools), sort_keys=True)] if tools else []
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()[:16]


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


def _shape(first: tuple[str, Row], name: str, columns: Mapping[str, str]) -> Format:
    where, row = first
    try:
        check_columns(columns, list(row))
        named = renamed(row, columns)
        return find(name, list(named), named)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _read_all(
    numbered: Iterator[tuple[str, Row]], shape: Format, columns: Mapping[str, str]
) -> Iterator[Usable | Dropped]:
    """Every row as usable or dropped; after a malformed one only to count how many there are."""
    errors: list[str] = []
    malformed = 0
    for where, row in numbered:
        try:
            result = _result(row, where, shape, columns)
        except FieldError as error:
            malformed += 1
            if malformed <= _SHOWN_ERRORS:
                errors.append(f"  {where}: {_renamed_field(error.field, columns)}: {error.problem}")
            continue
        if not malformed:
            yield result
    if malformed:
        raise UserError(_malformed(malformed, errors, shape))


def _result(row: Row, where: str, shape: Format, columns: Mapping[str, str]) -> Usable | Dropped:
    try:
        return _usable(shape.parse(renamed(row, columns)), where)
    except Unusable as reason:  # well formed, but there is nothing to learn from it
        return Dropped(where, str(reason))


def _malformed(count: int, errors: list[str], shape: Format) -> str:
    more = [f"  and {count - len(errors)} more"] if count > len(errors) else []
    rows_cannot = "1 row cannot" if count == 1 else f"{count} rows cannot"
    head = f"{rows_cannot} be read as {shape.name} ({', '.join(shape.needs)}). Mend or delete them:"
    return "\n".join([head, *errors, *more])


def _renamed_field(field: str, columns: Mapping[str, str]) -> str:
    for name, column in columns.items():
        if field == name or field.startswith(f"{name}["):
            return f"{field} (column {column})"
    return field


def _usable(parsed: Parsed, where: str) -> Usable:
    if len(parsed.responses) < 2:
        raise Unusable("fewer than two responses")
    if not any(message["content"].strip() for message in parsed.prompt if message["role"] != "system"):
        raise Unusable("empty prompt")
    filled = [place for place, response in enumerate(parsed.responses) if response.strip()]
    if len(filled) < 2:
        raise Unusable("empty response")
    distinct = _distinct(parsed, filled)
    if len(distinct) < 2:
        raise Unusable("identical responses")
    ranks = dense([parsed.ranks[place] for place in distinct])
    if len(set(ranks)) < 2:
        raise Unusable("all ranks tied")
    responses = tuple(parsed.responses[place] for place in distinct)
    comparison = Comparison(
        key=comparison_key(parsed.prompt, responses),
        prompt=parsed.prompt,
        responses=responses,
        ranks=ranks,
        source=where,
        scores=None if parsed.scores is None else tuple(parsed.scores[place] for place in distinct),
        spans=None if parsed.spans is None else tuple(parsed.spans[place] for place in distinct),
    )
    return Usable(comparison, len(parsed.responses) - len(filled), len(filled) - len(distinct))


def _distinct(parsed: Parsed, places: Sequence[int]) -> list[int]:
    """Of identical responses the first where their ranks agree, none where they do not."""
    same: defaultdict[str, list[int]] = defaultdict(list)
    for place in places:
        same[parsed.responses[place]].append(place)
    return sorted(group[0] for group in same.values() if len({parsed.ranks[place] for place in group}) == 1)


def _loaded(results: Sequence[Usable | Dropped], format_name: str) -> Loaded:
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
        notes=notes_of(sum(row.empty_removed for row in kept), sum(row.identical_removed for row in kept)),
        format=format_name,
    )


def notes_of(empty: int, identical: int) -> dict[str, int]:
    """How many responses were taken out of rows that were kept, by reason; what never happened is left out."""
    notes = {"empty response removed": empty, "identical response removed": identical}
    return {reason: count for reason, count in notes.items() if count}


def _repeated(comparisons: Sequence[Comparison]) -> list[str]:
    keys = np.array([int(comparison.key, 16) for comparison in comparisons], np.uint64)
    opinions = np.array([opinion(comparison) for comparison in comparisons], np.uint64)
    return [REPEATED[verdict] for verdict in repeated(keys, opinions)]


def opinion(comparison: Comparison) -> int:
    """Which rank each response has, as a hash of 64 bits; the order of the responses does not matter."""
    ranked = sorted(zip(comparison.responses, comparison.ranks, strict=True))
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
