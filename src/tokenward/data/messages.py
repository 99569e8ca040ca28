"""Messages of a row. Every key is kept, and the content becomes text. Malformed messages raise a FieldError."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from tokenward.data.fields import (
    Cell,
    FieldError,
    Row,
    describe,
    number,
    objects,
    parsed,
    read,
    required,
    text,
)
from tokenward.types import Message

Conversation = tuple[Message, ...]

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
"""The role for each value of ShareGPT's ``from``. A ``function_call`` is a call by the assistant."""

ASSISTANTS = (*(name for name, role in _ROLES.items() if role == "assistant"), "function_call")
"""Values of ``role`` or ShareGPT's ``from`` that mean the assistant."""

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys under which data sets store the reasoning before an answer."""


def messages(value: object, field: str) -> Conversation:
    """A list of messages, each with ``role`` and ``content``, or with ShareGPT's ``from`` and ``value``."""
    return tuple(_message(entry, f"{field}[{i}].") for i, entry in enumerate(objects(value, field)))


def text_or_messages(value: object, field: str) -> str | Conversation:
    """Text as it is, a list as messages, and an object as one message."""
    if isinstance(value, Cell) and value.startswith(("[{", "{")):
        table = parsed(value)
        value = table if isinstance(table, list) or _is_message(table) else value
    if isinstance(value, str):
        return text(value, field)
    if _is_message(value):
        return (_message(cast(Row, value), f"{field}."),)
    if not isinstance(value, Sequence):
        raise FieldError(field, f"found {describe(value)}, expected text or a list of messages")
    return messages(value, field)


def tools_of(row: Row) -> tuple[Mapping[str, Any], ...]:
    """The optional column ``tools``: a list of objects, or JSON text of one."""
    value = row.get("tools")
    if value is None or value == "":
        return ()
    found = objects(_from_json(value), "tools")
    return tuple(_json_value(tool, f"tools[{i}]") for i, tool in enumerate(found))


def readable(conversation: Sequence[Message]) -> str:
    """The assistant's texts and calls in some messages, one per line."""
    spoken = (_spoken(turn) for turn in conversation if turn["role"] == "assistant")
    return "\n".join(line for line in spoken if line)


def is_plain(conversation: Sequence[Message]) -> bool:
    """Whether this is a single message with a text and nothing else."""
    return len(conversation) == 1 and conversation[0].keys() == {"role", "content"}


def trains(conversation: Sequence[Message]) -> bool:
    """Whether a message of the assistant has a weight other than 0."""
    return any(turn["role"] == "assistant" and turn.get("weight", 1) != 0 for turn in conversation)


def without_filled(value: Any, *, inside: bool = False) -> Any:
    """A row of a typed table without the nulls that the table added inside messages and tools.

    Parquet and datasets give all objects of a column the same keys, so each call would get the arguments of all others.
    """
    if isinstance(value, list):
        return [without_filled(inner, inside=inside) for inner in value]
    if not isinstance(value, Mapping):
        return value
    below = inside or bool(value.keys() & {"role", "from", "function", "tool_calls"})
    kept = {key: inner for key, inner in value.items() if not inside or inner is not None}
    return {key: without_filled(inner, inside=below) for key, inner in kept.items()}


def _message(entry: Row, path: str) -> Message:
    """One message with all its keys. Null values are left out, because tables fill them in."""
    if "from" in entry and "role" not in entry:
        entry = _from_sharegpt(entry, path)
    made: dict[str, Any] = {"role": read(entry, "role", text, path=path), "content": _content(entry, path)}
    for key, value in entry.items():
        if key not in made and value is not None:
            made[key] = _extra(key, value, path + key)
    if made.get("tool_calls") == []:
        del made["tool_calls"]
    return cast(Message, made)


def _extra(key: str, value: object, field: str) -> Any:
    """The value of a key other than role and content."""
    if key == "weight":
        weight = number(value, field)
        if weight not in (0, 1):
            raise FieldError(field, f"found {describe(value)}, expected 0 (no loss on this message) or 1")
        return int(weight)
    if key == "tool_calls":
        return [
            _json_value(call, f"{field}[{i}]") for i, call in enumerate(objects(_from_json(value), field))
        ]
    return _json_value(value, field)


def _content(entry: Row, path: str) -> str:
    if entry.get("content") is None and (entry.get("tool_calls") or entry.get("function_call")):
        return ""
    value, field = required(entry, "content", path=path), path + "content"
    if isinstance(value, str):
        return text(value, field)
    if not isinstance(value, Sequence):
        raise FieldError(field, f"found {describe(value)}, expected text or a list of text parts")
    return "".join(_part(part, f"{field}[{i}]") for i, part in enumerate(value))


def _part(part: object, field: str) -> str:
    if isinstance(part, str):
        return text(part, field)
    if not isinstance(part, Mapping):
        raise FieldError(field, f"found {describe(part)}, expected text or an object with type and text")
    kind = part.get("type", "text")
    if kind not in ("text", "input_text", "output_text"):
        raise FieldError(
            field,
            f"found a part of type {kind}, but only text is supported. Write it as text, or remove the row",
        )
    return read(part, "text", text, path=f"{field}.")


def _from_sharegpt(entry: Row, path: str) -> Row:
    speaker = read(entry, "from", text, path=path)
    more = {key: value for key, value in entry.items() if key not in ("from", "value")}
    value = required(entry, "value", path=path)
    if speaker == "function_call":
        call = _from_json(value)
        if not isinstance(call, Mapping) or "name" not in call:
            example = '{"name": "f", "arguments": {}}'
            raise FieldError(path + "value", f"is not a call. A function_call is JSON such as {example}")
        calls = [{"type": "function", "function": call}]
        return {"role": "assistant", "content": None, "tool_calls": calls, **more}
    if speaker not in _ROLES:
        raise FieldError(path + "from", f"found {speaker!r}, expected {', '.join(_ROLES)} or function_call")
    return {"role": _ROLES[speaker], "content": value, **more}


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def _json_value(value: object, field: str) -> Any:
    """A value that JSON can represent, checked all the way down."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return text(value, field)
    if isinstance(value, Mapping):
        return {text(key, field): _json_value(inner, f"{field}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(inner, f"{field}[{i}]") for i, inner in enumerate(value)]
    raise FieldError(
        field, f"found {describe(value)}, which JSON cannot represent. Store it as text or as a number"
    )


def _from_json(value: object) -> object:
    """The value of JSON text; other values, and text that is not JSON, as they are."""
    return parsed(Cell(value)) if isinstance(value, str) else value


def _spoken(turn: Message) -> str:
    calls = [*turn.get("tool_calls", ()), *([turn["function_call"]] if "function_call" in turn else [])]  # type: ignore[typeddict-item]
    lines = [*([turn["content"]] if turn["content"].strip() else []), *map(_call_text, calls)]
    return "\n".join(lines) or next((str(turn[key]) for key in THOUGHTS if turn.get(key)), "")  # type: ignore[literal-required]


def _call_text(call: Any) -> str:
    """A call as ``name({"city": "Oslo"})``; a call of another shape as its JSON."""
    function = call.get("function", call) if isinstance(call, Mapping) else call
    if not isinstance(function, Mapping) or "name" not in function:
        return json.dumps(call, ensure_ascii=False)
    arguments = function.get("arguments", {})
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f"{function['name']}({written})"
