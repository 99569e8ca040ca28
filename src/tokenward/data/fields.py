"""Typed reading of one row's fields: what is not what it should be is named, with what was found."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


class FieldError(Exception):
    """A field that is missing, null or of the wrong type."""

    def __init__(self, field: str, problem: str) -> None:
        """Name the field and the problem.

        Args:
            field: Its path in the row, such as ``answers[2].rank``.
            problem: What was found and what was expected.
        """
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class Unusable(Exception):
    """A row that is well formed but holds nothing to learn from; its message is what it is counted under."""


class Cell(str):
    """A cell of a text table, which knows no types: where a number or a list is due, it is parsed."""

    __slots__ = ()


def describe(value: object) -> str:
    """What a value is, without its text: data may hold what nobody wants in a log."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return f"a list of {len(value)}"
    return type(value).__name__


def optional(row: Row, field: str) -> Any:
    """The value of a field that may be left out; None when it is, or is an empty cell of a table."""
    value = row.get(field)
    return None if isinstance(value, Cell) and not value else value


def required(row: Row, field: str, *, path: str = "") -> Any:
    """The value of a field that must be there.

    Args:
        row: The row, or an object inside it.
        field: The key.
        path: Where ``row`` itself stands, such as ``answers[2].``; empty for the row.

    Raises:
        FieldError: The field is missing or null.
    """
    if field not in row:
        raise FieldError(path + field, f"missing; found only {', '.join(map(str, row)) or 'nothing'}")
    if row[field] is None:
        raise FieldError(path + field, "found null")
    return row[field]


def text(value: object, field: str) -> str:
    """A piece of text.

    Raises:
        FieldError: It is no text, or holds half of a surrogate pair, which no tokenizer can encode.
    """
    if not isinstance(value, str):
        raise FieldError(field, f"found {describe(value)}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise FieldError(field, f"holds half of a surrogate pair at character {error.start}") from error
    return str(value)


def number(value: object, field: str) -> float:
    """A finite number.

    Raises:
        FieldError: It is something else; NaN and infinities too, since nothing can be ranked by them.
    """
    value = parsed(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise FieldError(field, f"found {describe(value)}, expected a finite number")
    return float(value)


def integer(value: object, field: str) -> int:
    """A whole number; 2.0 is one, since tables with gaps store integers as floats.

    Raises:
        FieldError: It is something else.
    """
    whole = number(value, field)
    if not whole.is_integer():
        raise FieldError(field, f"found the number {whole}, expected a whole number")
    return int(whole)


def items(value: object, field: str) -> Sequence[Any]:
    """A list.

    Raises:
        FieldError: It is something else.
    """
    value = parsed(value)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise FieldError(field, f"found {describe(value)}, expected a list")
    return value


def objects(value: object, field: str) -> Sequence[Row]:
    """A list of objects.

    Raises:
        FieldError: It is something else.
    """
    entries = items(value, field)
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise FieldError(f"{field}[{index}]", f"found {describe(entry)}, expected an object")
    return entries


def parsed(value: object) -> Any:
    """The value of a table's cell; anything else, and a cell that is not JSON, as it is."""
    if not isinstance(value, Cell):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):  # a cell of ordinary text, which the caller names as such
        return value
