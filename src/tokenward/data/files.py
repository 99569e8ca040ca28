"""Readers of one data file each, and comparisons as JSON lines."""

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from tokenward.data.fields import Cell, describe
from tokenward.data.messages import without_filled
from tokenward.errors import UserError
from tokenward.types import Comparison, Message, Span

Rows = Iterator[tuple[str, dict[str, Any]]]


class _Table(NamedTuple):
    """How a kind of text table separates its cells, and what to do where one is not so."""

    name: str
    delimiter: str
    quoting: Literal[0, 3]
    advice: str


_CSV = _Table("CSV", ",", csv.QUOTE_MINIMAL, "Quote each cell that holds a comma, quote or line break")
_TSV = _Table("TSV", "\t", csv.QUOTE_NONE, "Take tabs and line breaks out of the cells")

_BATCH_ROWS = 256  # of a Parquet file held at once: long conversations reach a megabyte a row


def jsonl_rows(path: Path) -> Rows:
    """One row per line of a JSONL file; blank lines are passed over.

    Raises:
        UserError: A line is not a JSON object, or not UTF-8.
    """
    for line_number, line in _lines(path):
        if line.strip():
            where = f"{path}:{line_number}"
            yield where, _json_object(line, where)


def json_rows(path: Path) -> Rows:
    """The objects of a JSON file: one list, or an object that holds one list. Rows count from 1.

    Raises:
        UserError: The file is not JSON, or holds no such list.
    """
    whole = "".join(line for _, line in _lines(path))
    try:
        content = json.loads(whole)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {_reason(error)}.{_json_advice(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON that can be read: {error}.") from error
    for number, row in enumerate(_only_list(content, path), 1):
        if not isinstance(row, dict):
            raise UserError(
                f"{path}:row {number}: found {describe(row)}, expected an object with named fields."
            )
        yield f"{path}:row {number}", row


def csv_rows(path: Path) -> Rows:
    """One row per record of a CSV file with a header; ``where`` is the line on which the record starts.

    Raises:
        UserError: A record is malformed or has another number of cells than the header.
    """
    return _table_rows(path, _CSV)


def tsv_rows(path: Path) -> Rows:
    """One row per line of a file of tab-separated cells with a header, as the IANA type has it: no cell is quoted.

    A quote character is text like any other, also at the start of a cell; a cell holds no tab and no line break.

    Raises:
        UserError: A line has another number of cells than the header.
    """
    return _table_rows(path, _TSV)


def _table_rows(path: Path, table: _Table) -> Rows:
    lines = (line for _, line in _lines(path))
    reader = csv.reader(lines, delimiter=table.delimiter, quoting=table.quoting, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise UserError(
                f"{path}:1: a column name stands twice in {', '.join(header)}. Give each its own name."
            )
        start = reader.line_num + 1
        for cells in reader:
            if cells:
                yield f"{path}:{start}", _record(header, cells, f"{path}:{start}", table.advice)
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{path}:{reader.line_num}: not {table.name}: {error}. {table.advice}, or save the data as JSONL."
        ) from error


def parquet_rows(path: Path) -> Rows:
    """The rows of a Parquet file, counted from 1.

    Raises:
        UserError: The file is no whole Parquet file.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:row {number}", without_filled(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a whole Parquet file: {error}. Write or copy it again.") from error


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": jsonl_rows,
    ".jsonl.gz": jsonl_rows,
    ".json": json_rows,
    ".json.gz": json_rows,
    ".csv": csv_rows,
    ".csv.gz": csv_rows,
    ".tsv": tsv_rows,
    ".tsv.gz": tsv_rows,
    ".parquet": parquet_rows,
}


def extension(path: Path) -> str:
    """The end of a name that says how to read the file, in lower case: ``.jsonl.gz`` for ``a.b.jsonl.gz``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return "".join(suffixes[-2:] if suffixes[-1:] == [".gz"] else suffixes[-1:])


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Decoded lines with their ends, numbered from 1."""
    try:
        with gzip.open(path) if extension(path).endswith(".gz") else path.open("rb") as stream:
            for number, raw in enumerate(stream, 1):
                yield number, _decoded(raw, f"{path}:{number}", "utf-8-sig" if number == 1 else "utf-8")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        advice = "Copy the file again, or unpack it and take .gz off its name."
        raise UserError(f"{path}: not a whole gzip file: {error}. {advice}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _decoded(raw: bytes, where: str, encoding: str) -> str:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        found = f"byte 0x{raw[error.start]:02x} at position {error.start} of the line"
        raise UserError(f"{where}: not UTF-8: {found}. Save the file as UTF-8.") from error


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        advice = "Each line must hold one whole JSON object: mend or delete this line."
        if line.strip() in ("[", "{"):
            advice = (
                "The file looks like JSON over several lines: name it .json, or write one object per line."
            )
        raise UserError(f"{where}: not JSON: {_reason(error)}. {advice}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON that can be read: {error}. Mend or delete this line.") from error
    if not isinstance(row, dict):
        advice = (
            'Each line must hold one object, such as {"prompt": "...", "chosen": "...", "rejected": "..."}'
        )
        if isinstance(row, list):
            advice += "; a file that is one JSON list must be named .json"
        raise UserError(f"{where}: found {describe(row)}, expected an object. {advice}.")
    return row


def _reason(error: json.JSONDecodeError) -> str:
    return f"{error.msg} at column {error.colno}"


def _json_advice(error: json.JSONDecodeError) -> str:
    if error.msg == "Extra data":
        return " If each line is one object, name the file .jsonl."
    return " The file must hold one list of objects: mend it there."


def _only_list(content: object, path: Path) -> list[Any]:
    if isinstance(content, list):
        return content
    shape = "The file must hold one list of objects, bare or as the only list of an object."
    if not isinstance(content, dict):
        raise UserError(f"{path}: found {describe(content)}. {shape}")
    lists = {name: value for name, value in content.items() if isinstance(value, list)}
    if len(lists) != 1:
        found = f"{len(lists)} lists ({', '.join(lists)})" if lists else "an object without a list"
        raise UserError(f"{path}: found {found}. {shape}")
    return next(iter(lists.values()))


def _record(header: list[str], cells: list[str], where: str, advice: str) -> dict[str, Any]:
    if len(cells) != len(header):
        raise UserError(f"{where}: {len(cells)} cells, the header has {len(header)}. {advice}.")
    return dict(zip(header, map(Cell, cells), strict=True))


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
