"""Typed access to the fields of a row.

A field that cannot be read raises a FieldError, which names the field, what was found and what was expected.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

from tokenward.errors import UserError

Row = Mapping[str, Any]
T = TypeVar("T")


class FieldError(Exception):
    """A field is missing, null or of the wrong type.

    Args:
        field: Path of the field in the row, such as ``answers[2].rank``.
        problem: What was found and what was expected.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class Unusable(Exception):
    """A well-formed row that contains nothing to learn from. The message is the reason it is counted under."""


class Cell(str):
    """A cell of a CSV or TSV file. It has no type: it is parsed as JSON where a number or a list is expected."""

    __slots__ = ()


def unknown_name(
    name: str, kind: str, known: Iterable[str], *, key: str, code: str = "unknown-name"
) -> UserError:
    """The error for a name that is not ``kind``. It lists the known names and suggests the most similar one."""
    known = list(known)
    near = get_close_matches(name, known, n=1)
    advice = f" Did you mean {near[0]}?" if near else ""
    return UserError(f"{name} is not {kind}.{advice} There are: {', '.join(known)}.", code=code, key=key)


def describe(value: object) -> str:
    """The type and size of a value, without its text, which may be private."""
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
    """The value of an optional field; None if it is missing, null or an empty cell."""
    value = row.get(field)
    return None if isinstance(value, Cell) and not value else value


def required(row: Row, field: str, *, path: str = "") -> Any:
    """The value of a required field. ``path`` is the prefix of the row in errors, such as ``answers[2].``."""
    if field not in row:
        raise FieldError(path + field, f"missing; found only {', '.join(map(str, row)) or 'nothing'}")
    if row[field] is None:
        raise FieldError(path + field, "found null")
    return row[field]


def read(row: Row, field: str, convert: Callable[[Any, str], T], *, path: str = "") -> T:
    """A required field, converted by one of the functions below."""
    return convert(required(row, field, path=path), path + field)


def text(value: object, field: str) -> str:
    """The value as text."""
    if not isinstance(value, str):
        raise FieldError(field, f"found {describe(value)}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # no tokenizer can encode it either
        raise FieldError(field, f"holds half of a surrogate pair at character {error.start}") from error
    return str(value)


def number(value: object, field: str) -> float:
    """The value as a finite number."""
    value = parsed(value)
    if not isinstance(value, bool) and isinstance(value, int | float):
        with contextlib.suppress(OverflowError):  # an integer of some hundred digits
            if math.isfinite(found := float(value)):
                return found
    raise FieldError(field, f"found {describe(value)}, expected a finite number")


def integer(value: object, field: str) -> int:
    """The value as an integer. 2.0 is accepted, because tables with missing values store integers as floats."""
    whole = number(value, field)
    if not whole.is_integer():
        raise FieldError(field, f"found the number {whole}, expected a whole number")
    return int(whole)


def items(value: object, field: str) -> Sequence[Any]:
    """The value as a list."""
    value = parsed(value)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise FieldError(field, f"found {describe(value)}, expected a list")
    return value


def objects(value: object, field: str) -> Sequence[Row]:
    """The value as a list of objects."""
    entries = items(value, field)
    for index, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise FieldError(f"{field}[{index}]", f"found {describe(entry)}, expected an object")
    return entries


def parsed(value: object) -> Any:
    """The JSON value of a cell. Other values, and cells that are not JSON, are returned as they are."""
    if not isinstance(value, Cell):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):  # ordinary text
        return value
