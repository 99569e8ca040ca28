"""What is wrong with the keys and values of a recipe, in words."""

import difflib
import types
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from tokenward.config.base import Named, Table
from tokenward.config.schema import ANY_NAME, RENAMED, Recipe, named_table_of, schema_fields, table_of

_TOP = "the top level"
_ABSENT = object()
_CLOSE = 0.6
_SWAPPED = 0.9

# Keys that people look for in a stage's table -> the inner table in which they live.
_INNER = {
    "beta": "objective",
    "gamma": "objective",
    "label_smoothing": "objective",
    "fraction": "selection",
    "bf16": "training",
    "eval_strategy": "training",
    "gradient_accumulation_steps": "training",
    "learning_rate": "training",
    "logging_steps": "training",
    "lr_scheduler_type": "training",
    "max_steps": "training",
    "num_train_epochs": "training",
    "per_device_train_batch_size": "training",
    "save_steps": "training",
    "warmup_steps": "training",
    "weight_decay": "training",
    "lora_alpha": "adapter",
    "lora_dropout": "adapter",
    "target_modules": "adapter",
}


class Problem(NamedTuple):
    """A dotted key and what is wrong with it."""

    key: str
    message: str


def nearest(word: str, names: Sequence[str]) -> list[str]:
    """At most two of the names, those a typing error away from the word, the nearest first."""
    likeness = {name: _likeness(_folded(word), _folded(name)) for name in names}
    close = [name for name in names if likeness[name] >= _CLOSE]
    return sorted(close, key=likeness.__getitem__, reverse=True)[:2]


def _likeness(one: str, other: str) -> float:
    ratio = difflib.SequenceMatcher(None, one, other).ratio()
    # difflib can miss two letters that changed places: it finds "evla" far from "eval".
    return max(ratio, _SWAPPED) if sorted(one) == sorted(other) else ratio


def _folded(name: str) -> str:
    return name.lower().replace("-", "_")


def either(words: Sequence[str]) -> str:
    """The words as a choice: ``a, b or c``."""
    return " or ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def renamed_keys(values: dict[str, Any]) -> Iterator[Problem]:
    """Keys of an earlier version, each with its new name."""
    for old, new in RENAMED.items():
        for key in _written_at(values, old.split(".")):
            yield Problem(key, f"key '{key}' is now called {new}.")


def _written_at(values: Any, parts: list[str], before: tuple[str, ...] = ()) -> Iterator[str]:
    """Dotted paths in a recipe that match a path of the schema."""
    first, *rest = parts
    if not isinstance(values, dict):
        return
    for key in values if first == ANY_NAME else [first]:
        if key not in values:
            continue
        path = (*before, str(key))
        yield from _written_at(values[key], rest, path) if rest else [".".join(path)]


def unknown_keys(
    values: dict[str, Any], table: type[Table] = Recipe, path: tuple[str, ...] = ()
) -> Iterator[Problem]:
    """Keys that the schema lacks, each with its nearest name or the table it belongs to."""
    for key, value in values.items():
        field = table.model_fields.get(key)
        inner = table_of(field) if field is not None else None
        if field is None:
            place = f"in {'.'.join(path)}" if path else f"at {_TOP}"
            advice = _advice(key, table, ".".join(path), [k for k in table.model_fields if k not in values])
            yield Problem(".".join((*path, key)), f"unknown key '{key}' {place}. {advice}")
        elif inner is not None and isinstance(value, dict):
            yield from unknown_keys(value, inner, (*path, key))
        elif (named := named_table_of(field)) is not None and isinstance(value, dict):
            for name, content in value.items():
                yield from unknown_keys(
                    content if isinstance(content, dict) else {}, named, (*path, key, name)
                )


def _advice(key: str, table: type[Table], path: str, absent: list[str]) -> str:
    homes = _homes(key, table, path)
    if homes:
        return f"'{key}' belongs to {either(homes)}."
    # A key the table already has is a less likely meaning than one it lacks, unless only the last letter is missing.
    whole = [name for name in table.model_fields if name == f"{key}s"]
    close = [*whole, *(name for name in nearest(key, absent) if name not in whole)][:2]
    close = close or nearest(key, list(table.model_fields))
    if close:
        return f"Did you mean {either([repr(name) for name in close])}?"
    return f"Keys here: {', '.join(table.model_fields)}."


def _homes(key: str, table: type[Table], path: str) -> list[str]:
    inner = _INNER.get(key)
    if inner in table.model_fields:
        return [f"{path}.{inner}"]
    parents = [
        path.rpartition(".")[0] or _TOP for path, _ in schema_fields() if path.rpartition(".")[2] == key
    ]
    return parents + [path for path, _ in schema_fields() if path.rpartition(".")[2] == inner]


def wrong_values(error: ValidationError, values: dict[str, Any]) -> Iterator[Problem]:
    """What pydantic refused: what was got and what is allowed, once a key."""
    fields = dict(schema_fields())
    seen: set[str] = set()
    for detail in error.errors():
        if detail["type"] == "missing":
            yield _missing(".".join(map(str, detail["loc"])), fields)
            continue
        key, field, value = _locate(detail["loc"], fields, values)
        if key not in seen:  # a union reports every branch that failed
            seen.add(key)
            yield wrong_value(key, value, field)


def _missing(key: str, fields: dict[str, FieldInfo]) -> Problem:
    table, _, name = key.rpartition(".")
    return Problem(
        key,
        f"{table} has no {name}, and needs one: {fields[key].description} Write {table}: {{{name}: ...}}.",
    )


def wrong_value(key: str, value: Any, field: FieldInfo) -> Problem:
    """A value that its field does not take: what was got and what is allowed."""
    allowed = _allowed(field)
    hint = _hint(value, allowed, field.annotation)
    return Problem(key, f"{key}: got {show(value)}. Allowed: {allowed}.{hint}")


def _locate(
    loc: tuple[int | str, ...], fields: dict[str, FieldInfo], values: Any
) -> tuple[str, FieldInfo, Any]:
    key = general = str(loc[0])
    value = values[key]
    for part in loc[1:]:
        below = next(
            (f"{general}.{name}" for name in (part, ANY_NAME) if f"{general}.{name}" in fields), None
        )
        if below is None and not any(name.startswith(f"{general}.{ANY_NAME}.") for name in fields):
            break
        key, value, general = f"{key}.{part}", value[part], below or f"{general}.{ANY_NAME}"
    return key, fields.get(general, fields[general.removesuffix(f".{ANY_NAME}")]), value


def show(value: Any) -> str:
    """A value as it looks in a recipe, cut at 80 characters."""
    if value is None:
        return "null"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _hint(value: Any, allowed: str, annotation: Any) -> str:
    choices = () if get_origin(annotation) is dict else (annotation, *get_args(annotation))
    if isinstance(value, dict) and str in choices and value and set(value.values()) == {None}:
        return f' YAML reads braces as a table: put quotes around it, "{{{", ".join(map(str, value))}}}".'
    if isinstance(value, str):
        return _text_hint(value, allowed, choices)
    if isinstance(value, bool) and str in choices:
        return " YAML reads the words yes, no, on and off as true and false: put quotes around the word."
    if isinstance(value, int | float) and str in choices:
        return " Put quotes around it to make it text."
    if isinstance(value, float) and value.is_integer() and "whole number" in allowed:
        return f" Write {int(value)}."
    return ""


def _text_hint(value: str, allowed: str, choices: Sequence[Any]) -> str:
    if "number" in allowed and _is_number(value):
        return " Write it without quotes."
    if bool in choices and value.lower() in _SWITCHES:
        return " Write it without quotes."
    if Named in choices:
        return f" Write {{name: {value}}}."
    words = [choice for choice in choices if isinstance(choice, str)]
    words += [word for choice in choices for word in _enumerated(choice)]
    close = nearest(value, [*words, *(_SWITCHES if bool in choices else ())])
    return f" Did you mean {close[0]!r}?" if close else ""


def _enumerated(annotation: Any) -> list[str]:
    if not (isinstance(annotation, type) and issubclass(annotation, Enum)):
        return []
    return [str(member.value) for member in annotation.__members__.values()]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


_SWITCHES = ("true", "false")
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
    Named: "a table with a name, and arguments beside it",
}


def _allowed(field: FieldInfo) -> str:
    return _kind(field.annotation) + _bounds(field.metadata)


def _kind(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(args[0]) + _bounds(
            m for a in args[1:] for m in (a.metadata if isinstance(a, FieldInfo) else [a])
        )
    if origin is Literal:
        return either([str(value) for value in args])
    if origin in (Union, types.UnionType):
        return either([_kind(arg) for arg in args])
    if _enumerated(annotation):
        return either(_enumerated(annotation))
    if origin is list:
        return "a list of text"
    if origin is dict:
        return "a table whose values are text" if args[1] is str else "a table"
    return _WORDS.get(annotation, "a table")


def _bounds(metadata: Iterable[Any]) -> str:
    texts: list[str] = []
    for bound in metadata:
        match bound:
            case Gt(gt=limit):
                texts.append(f"> {limit}")
            case Ge(ge=limit):
                texts.append(f">= {limit}")
            case Lt(lt=limit):
                texts.append(f"< {limit}")
            case Le(le=limit):
                texts.append(f"<= {limit}")
    return f" {' and '.join(texts)}" if texts else ""
