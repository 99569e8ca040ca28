"""Readers for each kind of data file, and comparisons as JSON lines."""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import numpy as np

from tokenward.data.fields import Cell, describe
from tokenward.data.messages import without_filled
from tokenward.errors import UserError
from tokenward.types import Comparison, Message, Span

Rows = Iterator[tuple[str, dict[str, Any]]]

_BATCH_ROWS = 256  # of a Parquet file in memory at once: long conversations take a megabyte per row
_SCANNED_BYTES = 1 << 20
LONGEST_LINE = 1 << 28
"""Bytes of the longest line that is read."""

_LONGEST_CELL = 1 << 28  # Python's own limit for a table is 131,072 characters, less than a long conversation
_LINES_PER_LOOK = 256  # from one look at the position in a file to the next


class Meter:
    """How far the files of a source have been read, in bytes."""

    def __init__(self) -> None:
        self.total = 0  # of all files that are known to be read
        self._before = self._now = 0

    @property
    def done(self) -> int:
        """Bytes that have been read."""
        return self._before + self._now

    def expect(self, size: int) -> None:
        """Count ``size`` more bytes as to be read."""
        self.total += size

    def at(self, position: int) -> None:
        """Note the position in the present file."""
        self._now = position

    def end(self, size: int) -> None:
        """Note that a file of ``size`` bytes is finished."""
        self._before, self._now = self._before + size, 0


class _Table(NamedTuple):
    """The separators and quoting of a kind of text table, and advice for a file that violates them."""

    name: str
    delimiter: str
    quoting: Literal[0, 3]
    advice: str


_CSV = _Table("CSV", ",", csv.QUOTE_MINIMAL, "Quote each cell that contains a comma, quote or line break")
# As the IANA type defines it, no cell is quoted: a quote character is text, and a cell contains no tab or line break.
_TSV = _Table("TSV", "\t", csv.QUOTE_NONE, "Remove tabs and line breaks from the cells")


def jsonl_rows(path: Path, meter: Meter | None = None) -> Rows:
    """One row per line of a JSONL file. Blank lines are skipped.

    The position in the file is noted in ``meter``.

    Raises:
        UserError: A line is not a JSON object, or not UTF-8.
    """
    for line_number, line in _lines(path, meter):
        if line.strip():
            where = f"{path}:{line_number}"
            yield where, _json_object(line, where)


def _json_rows(path: Path, meter: Meter | None = None) -> Rows:
    """The objects of a JSON file that is a list, or an object with a single list."""
    text = "".join(line for _, line in _lines(path, meter))
    advice = "The file must contain one list of objects. If each line is one object, name it .jsonl."
    content = _loads(text, str(path), advice, whole_file=True)
    for number, row in enumerate(_only_list(content, path), 1):
        where = f"{path}:row {number}"
        if not isinstance(row, dict):
            raise UserError(
                f"{where}: found {describe(row)}, expected an object with named fields.", code="not-an-object"
            )
        yield where, row


def _table_rows(path: Path, meter: Meter | None = None, *, table: _Table) -> Rows:
    """One row per record of a file with a header. A record is named by the line on which it starts."""
    lines = (line for _, line in _lines(path, meter))
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(lines, delimiter=table.delimiter, quoting=table.quoting, strict=True)
    try:
        header = next(reader, [])
        _check_names(header, f"{path}:1")
        start = reader.line_num + 1
        for cells in reader:
            if cells:
                yield f"{path}:{start}", _record(header, cells, f"{path}:{start}", table.advice)
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}:{reader.line_num}: not {table.name}: {error}. {table.advice}, or save the data as JSONL.",
            code="not-a-table",
        ) from error


def _check_names(names: list[str], where: str) -> None:
    if len(set(names)) < len(names):
        raise UserError(
            f"{where}: two columns have the same name: {', '.join(names)}. Give each its own name.",
            code="duplicate-column",
        )


def _parquet_rows(path: Path, meter: Meter | None = None) -> Rows:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        size = path.stat().st_size
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_names(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                if meter is not None:
                    meter.at(size * number // file.metadata.num_rows)
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:row {number}", without_filled(row)
    except (UnicodeDecodeError, OverflowError) as error:  # of a value that Python cannot hold
        raise UserError(
            f"{path}: a value in one of the rows {number + 1} to {number + _BATCH_ROWS} cannot be read: {error}. Write the file again "
            "with text as UTF-8 and dates before the year 10000.",
            code="bad-value",
        ) from error
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: not a complete Parquet file: {error}. Write or copy it again.", code="damaged-file"
        ) from error


READERS: dict[str, Callable[[Path, Meter | None], Rows]] = {
    ".jsonl": jsonl_rows,
    ".jsonl.gz": jsonl_rows,
    ".json": _json_rows,
    ".json.gz": _json_rows,
    ".csv": partial(_table_rows, table=_CSV),
    ".csv.gz": partial(_table_rows, table=_CSV),
    ".tsv": partial(_table_rows, table=_TSV),
    ".tsv.gz": partial(_table_rows, table=_TSV),
    ".parquet": _parquet_rows,
}
"""Reader for each extension. Rows come with their position, ``file:line`` or ``file:row N``, counted from 1."""


def extension(path: Path) -> str:
    """The part of a name that decides how to read the file, in lower case: ``.jsonl.gz`` for ``a.b.jsonl.gz``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:])


def _lines(path: Path, meter: Meter | None = None) -> Iterator[tuple[int, str]]:
    """Decoded lines with their line ends, numbered from 1."""
    try:
        with path.open("rb") as file, _unpacked(path, file) as stream:
            for number, raw in enumerate(iter(lambda: stream.readline(LONGEST_LINE + 1), b""), 1):
                if len(raw) > LONGEST_LINE:  # a few packed bytes can be a line that no memory holds
                    message = f"{path}:{number}: the line has more than {LONGEST_LINE:,} bytes. Check that this file holds one row per line."
                    raise UserError(message, code="too-large")
                if meter is not None and not number % _LINES_PER_LOOK:
                    meter.at(file.tell())
                # Excel and others write a byte order mark at the start of the file.
                yield number, _decoded(raw, f"{path}:{number}", "utf-8-sig" if number == 1 else "utf-8")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        advice = "Copy the file again, or unpack it and remove .gz from its name."
        raise UserError(
            f"{path}: not a complete gzip file: {error}. {advice}", code="damaged-file"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror or error}.", code="unreadable-file"
        ) from error


def _unpacked(path: Path, file: BinaryIO) -> BinaryIO:
    return cast(BinaryIO, gzip.open(file)) if extension(path).endswith(".gz") else file


def _decoded(raw: bytes, where: str, encoding: str) -> str:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        found = f"byte 0x{raw[error.start]:02x} at position {error.start} of the line"
        raise UserError(f"{where}: not UTF-8: {found}. Save the file as UTF-8.", code="not-utf-8") from error


def _loads(text: str, where: str, advice: str, *, whole_file: bool = False) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f":{error.lineno}" if whole_file else ""
        reason = f"{error.msg} at column {error.colno}"
        raise UserError(f"{where}{line}: not JSON: {reason}. {advice}", code="not-json") from error
    except (ValueError, RecursionError) as error:  # a number with too many digits, or too many brackets
        raise UserError(f"{where}: not readable as JSON: {error}. {advice}", code="not-json") from error


def _json_object(line: str, where: str) -> dict[str, Any]:
    advice = "Each line must be a complete JSON object: fix or delete this line."
    if line.strip() in ("[", "{"):
        advice = "The file looks like JSON over several lines: name it .json, or write one object per line."
    row = _loads(line, where, advice)
    if not isinstance(row, dict):
        advice = 'Each line must be an object, such as {"prompt": "...", "chosen": "...", "rejected": "..."}'
        if isinstance(row, list):
            advice += "; a file that is one JSON list must be named .json"
        raise UserError(
            f"{where}: found {describe(row)}, expected an object. {advice}.", code="not-an-object"
        )
    return row


def _only_list(content: object, path: Path) -> list[Any]:
    if isinstance(content, list):
        return content
    lists = {}
    found = describe(content)
    if isinstance(content, dict):
        lists = {name: value for name, value in content.items() if isinstance(value, list)}
        found = f"{len(lists)} lists ({', '.join(lists)})" if lists else "an object without a list"
    if len(lists) != 1:
        shape = "The file must contain one list of objects, alone or as the only list of an object."
        raise UserError(f"{path}: found {found}. {shape}", code="not-a-list")
    return next(iter(lists.values()))


def _record(header: list[str], cells: list[str], where: str, advice: str) -> dict[str, Any]:
    if len(cells) != len(header):
        raise UserError(
            f"{where}: {len(cells)} cells, but the header has {len(header)}. {advice}.", code="not-a-table"
        )
    return dict(zip(header, map(Cell, cells), strict=True))


_LINE = json.JSONEncoder(ensure_ascii=False)  # making one takes as long as writing a short row


def to_line(row: Comparison) -> str:
    """A comparison as one line of JSON, with its line end."""
    record = {name: getattr(row, name) for name in row.__slots__}
    known = {name: value for name, value in record.items() if value is not None and value != ()}
    return _LINE.encode(known) + "\n"


def from_line(line: str | bytes) -> Comparison:
    """The comparison that :func:`to_line` wrote."""
    record: dict[str, Any] = json.loads(line)
    scores, spans, turns = (record.pop(name, None) for name in ("scores", "spans", "turns"))
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
    """Messages that were stored as JSON, with all their keys."""
    return tuple(cast(Message, dict(record)) for record in records)


def read_comparisons(path: Path) -> Iterator[Comparison]:
    """The comparisons of a file with one line each."""
    with path.open("rb") as file:
        for line in file:
            yield from_line(line)


def line_ends(path: Path) -> np.ndarray:
    """The position after each line, in bytes.  -> [lines] int64"""
    ends, before = [np.zeros(0, np.int64)], 0
    with path.open("rb") as file:
        while chunk := file.read(_SCANNED_BYTES):
            ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + before + 1)
            before += len(chunk)
    return np.concatenate(ends)
