"""Messages of rows, whole: every key is kept, and the content is text."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from tokenward.data.fields import (
    Cell,
    FieldError,
    Row,
    describe,
    items,
    number,
    objects,
    parsed,
    required,
    text,
)
from tokenward.types import Message

Conversation = tuple[Message, ...]

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""What ShareGPT's ``from`` says, and the role that it is. A ``function_call`` is an assistant's call."""

ASSISTANTS = (*(name for name, role in _ROLES.items() if role == "assistant"), "function_call")
"""Names of who replies, as ``role`` or ShareGPT's ``from`` has them."""

_TEXT_PARTS = ("text", "input_text", "output_text")

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message under which people store what the model thought before it answered."""


def messages(value: object, field: str) -> Conversation:
    """A list of messages, each with a role and a content, or with ShareGPT's ``from`` and ``value``.

    Raises:
        FieldError: It is something else.
    """
    return tuple(message(entry, f"{field}[{i}].") for i, entry in enumerate(objects(value, field)))


def message(entry: Row, path: str) -> Message:
    """One message with all its keys; those whose value is null are left out, as tables fill them in.

    Args:
        entry: The message as the row has it.
        path: Where it stands, such as ``prompt[2].``.

    Raises:
        FieldError: It has no role or no content, holds an image or the like, or a weight that is neither 0 nor 1.
    """
    if "from" in entry and "role" not in entry:
        entry = _from_sharegpt(entry, path)
    made: dict[str, Any] = {
        "role": text(required(entry, "role", path=path), path + "role"),
        "content": _content(entry, path),
    }
    for key, value in entry.items():
        if key not in made and value is not None:
            kept = _kept(key, value, path + key)
            if kept is not None:
                made[key] = kept
    return cast(Message, made)


def text_or_messages(value: object, field: str) -> str | Conversation:
    """Text as it is, a list as messages, an object as the one message that it is.

    Raises:
        FieldError: It is none of them.
    """
    if isinstance(value, Cell) and value.startswith(("[{", "{")):
        table = parsed(value)
        value = table if isinstance(table, list) or _is_message(table) else value
    if isinstance(value, str):
        return text(value, field)
    if _is_message(value):
        return (message(cast(Row, value), f"{field}."),)
    if not isinstance(value, Sequence):
        raise FieldError(field, f"found {describe(value)}, expected text or a list of messages")
    return messages(value, field)


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def tools_of(row: Row, field: str = "tools") -> tuple[Mapping[str, Any], ...]:
    """What a row says that the assistant may call: a list of objects, or JSON text of one; it may be left out.

    Raises:
        FieldError: It is something else.
    """
    value = row.get(field)
    if value is None or value == "":
        return ()
    return tuple(
        cast(Any, plain(tool, f"{field}[{i}]")) for i, tool in enumerate(objects(_from_json(value), field))
    )


def readable(conversation: Sequence[Message]) -> str:
    """What the assistant says in some messages, as a person reads it: a text or call a line."""
    return "\n".join(said for turn in conversation if turn["role"] == "assistant" and (said := _said(turn)))


def is_plain(conversation: Sequence[Message]) -> bool:
    """Whether this is one message of the assistant that holds its text and nothing else."""
    return len(conversation) == 1 and conversation[0].keys() == {"role", "content"}


def trains(conversation: Sequence[Message]) -> bool:
    """Whether some message of the assistant counts: its weight is not 0."""
    return any(turn["role"] == "assistant" and turn.get("weight", 1) != 0 for turn in conversation)


def plain(value: object, field: str) -> Any:
    """A value that JSON can hold, all through.

    Raises:
        FieldError: It holds something else, such as a date or bytes, or half of a surrogate pair.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return text(value, field)
    if isinstance(value, Mapping):
        return {text(key, field): plain(inner, f"{field}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, f"{field}[{i}]") for i, inner in enumerate(value)]
    raise FieldError(
        field, f"found {describe(value)}, expected what JSON can hold: write it as text or a number"
    )


def without_filled(value: Any) -> Any:
    """A row of a typed table without the nulls that it puts where one message or tool lacks a key of another.

    A table gives all objects of a column the same keys, so that a call of one function would come with the arguments
    of every other.
    """
    if isinstance(value, Mapping):
        own = value.keys() & {"role", "from", "function", "tool_calls"}
        return {key: (_stripped if own else without_filled)(inner) for key, inner in value.items()}
    return [without_filled(inner) for inner in value] if isinstance(value, list) else value


def _stripped(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _stripped(inner) for key, inner in value.items() if inner is not None}
    return [_stripped(inner) for inner in value] if isinstance(value, list) else value


def _kept(key: str, value: object, field: str) -> Any:
    """A further key of a message; None where it says nothing."""
    if key == "weight":
        weight = number(value, field)
        if weight not in (0, 1):
            raise FieldError(
                field, f"found {describe(value)}, expected 0 (leave the message out of the loss) or 1"
            )
        return int(weight)
    if key == "tool_calls":
        calls = [plain(call, f"{field}[{i}]") for i, call in enumerate(objects(_from_json(value), field))]
        return calls or None
    return plain(value, field)


def _content(entry: Row, path: str) -> str:
    if entry.get("content") is None and (entry.get("tool_calls") or entry.get("function_call")):
        return ""
    value = required(entry, "content", path=path)
    if isinstance(value, str):
        return text(value, path + "content")
    if not isinstance(value, Sequence):
        raise FieldError(path + "content", f"found {describe(value)}, expected text or a list of text parts")
    return "".join(
        _part(part, f"{path}content[{i}]") for i, part in enumerate(items(value, path + "content"))
    )


def _part(part: object, field: str) -> str:
    if isinstance(part, str):
        return text(part, field)
    if not isinstance(part, Mapping):
        raise FieldError(field, f"found {describe(part)}, expected text or an object with type and text")
    kind = part.get("type", "text")
    if kind not in _TEXT_PARTS:
        raise FieldError(
            field,
            f"is a part of type {kind}, and only text is read. Say it as a part of type text, or take the row out",
        )
    return text(required(part, "text", path=f"{field}."), f"{field}.text")


def _from_sharegpt(entry: Row, path: str) -> Row:
    said = text(required(entry, "from", path=path), path + "from")
    more = {key: value for key, value in entry.items() if key not in ("from", "value")}
    value = required(entry, "value", path=path)
    if said == "function_call":
        return {"role": "assistant", "content": None, "tool_calls": [_call(value, path + "value")], **more}
    if said not in _ROLES:
        raise FieldError(path + "from", f"is {said!r}, expected one of {', '.join(_ROLES)}, function_call")
    return {"role": _ROLES[said], "content": value, **more}


def _call(value: object, field: str) -> Mapping[str, Any]:
    call = _from_json(value)
    if not isinstance(call, Mapping) or "name" not in call:
        raise FieldError(field, 'is no call; a function_call is JSON such as {"name": "f", "arguments": {}}')
    return {"type": "function", "function": call}


def _from_json(value: object) -> object:
    """The value of JSON text; anything else, and text that is none, as it is."""
    return parsed(Cell(value)) if isinstance(value, str) else value


def _said(turn: Message) -> str:
    calls = [*turn.get("tool_calls", ()), *([turn["function_call"]] if "function_call" in turn else [])]  # type: ignore[typeddict-item]
    lines = [*([turn["content"]] if turn["content"].strip() else []), *map(_call_text, calls)]
    return "\n".join(lines) or next((str(turn[key]) for key in THOUGHTS if turn.get(key)), "")  # type: ignore[literal-required]


def _call_text(call: Any) -> str:
    """A call as ``name({"city": "Oslo"})``; one of another shape as its JSON."""
    function = call.get("function", call) if isinstance(call, Mapping) else call
    if not isinstance(function, Mapping) or "name" not in function:
        return json.dumps(call, ensure_ascii=False)
    arguments = function.get("arguments", {})
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f"{function['name']}({written})"
