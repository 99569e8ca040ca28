"""Descriptions of wrong keys and values in a recipe."""

import difflib
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from tokenward.config.base import Named, Settings
from tokenward.config.schema import ANY_NAME, RENAMED, Recipe, named_table_of, schema_fields, table_of
from tokenward.errors import UserError
from tokenward.hidden import hidden
from tokenward.trl_names import trl_advice

_TOP = "the top level"
_CLOSE = 0.6
_SWAPPED = 0.9

# Keys that people write directly into a stage's table -> the inner table that holds them.
_INNER = {
    **dict.fromkeys(("beta", "gamma", "label_smoothing"), "objective"),
    "fraction": "selection",
    **dict.fromkeys(
        ("bf16", "eval_strategy", "gradient_accumulation_steps", "learning_rate", "logging_steps", "lr_scheduler_type", "max_steps",
         "num_train_epochs", "per_device_train_batch_size", "save_steps", "warmup_steps", "weight_decay"),
        "training",
    ),
    **dict.fromkeys(("lora_alpha", "lora_dropout", "target_modules"), "adapter"),
}  # fmt: skip


class Problem(NamedTuple):
    """What is wrong with a dotted key, and the code of the error."""

    key: str
    message: str
    code: str


def refusal(problems: Sequence[Problem], place: Callable[[str], str]) -> UserError:
    """One error for all problems, a line each after the place of its key; code and key are those of the first."""
    lines = [f"{place(problem.key)}: {problem.message}" for problem in problems]
    return UserError("\n".join(lines), code=problems[0].code, key=problems[0].key)


def nearest(word: str, names: Sequence[str]) -> list[str]:
    """At most two names within a typing error of the word, nearest first."""
    likeness = {name: _likeness(_folded(word), _folded(name)) for name in names}
    close = [name for name in names if likeness[name] >= _CLOSE]
    return sorted(close, key=likeness.__getitem__, reverse=True)[:2]


def _likeness(one: str, other: str) -> float:
    ratio = difflib.SequenceMatcher(None, one, other).ratio()
    # difflib underrates transposed letters: "evla" is far from "eval" for it.
    return max(ratio, _SWAPPED) if sorted(one) == sorted(other) else ratio


def _folded(name: str) -> str:
    return name.lower().replace("-", "_")


def either(words: Sequence[str]) -> str:
    """The words as alternatives: ``a, b or c``."""
    return " or ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def renamed_keys(values: dict[str, Any]) -> Iterator[Problem]:
    """Old keys, each with its new name."""
    for old, new in RENAMED.items():
        for key in _written_at(values, old.split(".")):
            yield Problem(key, f"key '{key}' was renamed to {new}.", "renamed-key")


def _written_at(values: Any, parts: list[str], before: tuple[str, ...] = ()) -> Iterator[str]:
    """Dotted paths of a recipe that match a path of the schema."""
    first, *rest = parts
    if not isinstance(values, dict):
        return
    for key in values if first == ANY_NAME else [first]:
        if key not in values:
            continue
        path = (*before, str(key))
        yield from _written_at(values[key], rest, path) if rest else [".".join(path)]


def unknown_keys(
    values: dict[str, Any], table: type[Settings] = Recipe, path: tuple[str, ...] = ()
) -> Iterator[Problem]:
    """Keys that the schema lacks, each with the nearest name or the table that it belongs to."""
    for key, value in values.items():
        field = table.model_fields.get(key)
        inner = table_of(field) if field is not None else None
        if field is None:
            place = f"in {'.'.join(path)}" if path else f"at {_TOP}"
            advice = _advice(key, table, ".".join(path), [k for k in table.model_fields if k not in values])
            yield Problem(".".join((*path, key)), f"unknown key '{key}' {place}. {advice}", "unknown-key")
        elif inner is not None and isinstance(value, dict):
            yield from unknown_keys(value, inner, (*path, key))
        elif (named := named_table_of(field)) is not None and isinstance(value, dict):
            for name, content in value.items():
                yield from unknown_keys(
                    content if isinstance(content, dict) else {}, named, (*path, key, name)
                )


def _advice(key: str, table: type[Settings], path: str, absent: list[str]) -> str:
    homes = _homes(key, table, path)
    if homes:
        return f"'{key}' belongs to {either(homes)}."
    if trl := trl_advice(key, recipe=True):
        return trl
    # A key that the table lacks is the likelier meaning, unless only a final s is missing.
    whole = [name for name in table.model_fields if name == f"{key}s"]
    close = [*whole, *(name for name in nearest(key, absent) if name not in whole)][:2]
    close = close or nearest(key, list(table.model_fields))
    if close:
        return f"Did you mean {either([repr(name) for name in close])}?"
    return f"Keys here: {', '.join(table.model_fields)}."


def _homes(key: str, table: type[Settings], path: str) -> list[str]:
    inner = _INNER.get(key)
    if inner in table.model_fields:
        return [f"{path}.{inner}"]
    parents = [
        path.rpartition(".")[0] or _TOP for path, _ in schema_fields() if path.rpartition(".")[2] == key
    ]
    return parents + [path for path, _ in schema_fields() if path.rpartition(".")[2] == inner]


def wrong_values(error: ValidationError, values: dict[str, Any]) -> Iterator[Problem]:
    """What pydantic refused, one problem per key."""
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
    message = f"{table} needs {name}: {fields[key].description} Write {table}: {{{name}: ...}}."
    return Problem(key, message, "missing-key")


def wrong_value(key: str, value: Any, field: FieldInfo) -> Problem:
    """A value that its field does not accept: what was found and what is allowed."""
    allowed = _allowed(field)
    hint = _hint(value, allowed, field.annotation)
    return Problem(
        key, f"{key}: got {show(hidden({key: value})[key])}. Allowed: {allowed}.{hint}", "wrong-value"
    )


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
    """A value as a recipe writes it, at most 80 characters."""
    if value is None:
        return "null"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _hint(value: Any, allowed: str, annotation: Any) -> str:
    choices = () if get_origin(annotation) is dict else (annotation, *get_args(annotation))
    if isinstance(value, dict) and str in choices and value and set(value.values()) == {None}:
        return (
            f' YAML reads braces as a table. Put quotes around the text: "{{{", ".join(map(str, value))}}}".'
        )
    if isinstance(value, str):
        return _text_hint(value, allowed, choices)
    if isinstance(value, bool) and str in choices:
        return " YAML reads yes, no, on and off as true and false. Put quotes around the word."
    if isinstance(value, int | float) and str in choices:
        return " Put quotes around it."
    if isinstance(value, float) and value.is_integer() and "whole number" in allowed:
        return f" Write {int(value)}."
    return ""


def _text_hint(value: str, allowed: str, choices: Sequence[Any]) -> str:
    if ("number" in allowed and _is_number(value)) or (bool in choices and value.lower() in _SWITCHES):
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
    Named: "a table with a name and arguments",
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
