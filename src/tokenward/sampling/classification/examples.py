"""Texts with a class each, from any file of rows."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from tokenward.data.fields import FieldError, Row, integer, required
from tokenward.data.fields import text as text_field
from tokenward.data.sources import rows
from tokenward.errors import UserError


class LabelledText(NamedTuple):
    """A text and its class.

    Attributes:
        text: As it stands in the file.
        label: Class, counted from 0.
        source: Where it came from, as ``file:line``, for messages to the user.
    """

    text: str
    label: int
    source: str


def read_labelled(
    path: str | Path, text: str | Sequence[str], label: str, *, classes: int | None = None
) -> list[LabelledText]:
    """The labelled texts of a file (TSV, CSV, JSONL, JSON, Parquet), in its order.

    Args:
        path: The file; text tables have a header.
        text: Name of the text column, or several, of which the file has one (the published AG News files call it
            ``text`` in one split and ``sentence`` in another).
        label: Name of the column of whole numbers from 0.
        classes: How many classes there are; None takes any label.

    Raises:
        UserError: The file cannot be read, has no rows or no such column, or a row's text is empty or its label no
            class.
    """
    names = [text] if isinstance(text, str) else list(text)
    found = [_labelled(row, where, names, label, classes) for where, row in rows(path)]
    if not found:
        raise UserError(f"{path}: holds no rows. Write a header and one text with its label per line.")
    return found


def _labelled(row: Row, where: str, names: list[str], label: str, classes: int | None) -> LabelledText:
    present = [name for name in names if name in row]
    if len(present) != 1:
        raise UserError(f"{where}: {_column_problem(row, names, present)}")
    _check_column(row, where, label)
    try:
        content = text_field(required(row, present[0]), present[0])
        number = integer(required(row, label), label)
    except FieldError as error:
        raise UserError(f"{where}: {error}. Labels are whole numbers from 0, texts are text.") from error
    if not content.strip():
        raise UserError(f"{where}: {present[0]} is empty. Mend or delete this row.")
    if number < 0 or (classes is not None and number >= classes):
        allowed = "0 or more" if classes is None else f"0 to {classes - 1}, one for each verbalizer"
        raise UserError(f"{where}: {label} is {number}. Labels must be {allowed}.")
    return LabelledText(content, number, where)


def _column_problem(row: Row, names: list[str], present: list[str]) -> str:
    if present:
        return f"has the columns {' and '.join(present)}. Name the one that holds the text."
    return _missing(row, " or ".join(names), names[0])


def _check_column(row: Row, where: str, name: str) -> None:
    if name not in row:
        raise UserError(f"{where}: {_missing(row, name, name)}")


def _missing(row: Row, wanted: str, name: str) -> str:
    near = get_close_matches(name, list(row), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"has no column {wanted}.{hint} It has: {', '.join(row)}."
