"""Where a reply stands in its conversation: which characters the assistant writes, and which the template or others do."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from tokenward.errors import UserError
from tokenward.tokens.template import Template, joined
from tokenward.types import Comparison, Message

_BEGUN = re.compile(r"(<[^<>\s]*|\w+)\Z")
_GOES_ON = re.compile(r"[\w|]")


class Asked(NamedTuple):
    """A prompt as text.

    Attributes:
        text: As the model sees it when it generates.
        head: As it is before a reply's text in a conversation that has one; mostly the same.
        tail: What is written after a reply's text.
    """

    text: str
    head: str
    tail: str


class Written(NamedTuple):
    """A whole conversation as text.

    Attributes:
        text: To its end.
        own: Characters that the assistant writes and learns, one range for each of its messages, the end of its turn
            included but for the last; the last end is None where only the tokens tell.
        ends: Whether the last range is the conversation's last message, after which its end of turn is written.
    """

    text: str
    own: list[tuple[int, int | None]]
    ends: bool = True


class Unplaced(Exception):
    """A reply that cannot be found in what the template writes."""


def write_prompt(template: Template, comparison: Comparison) -> Asked:
    """The prompt of a comparison.

    Raises:
        UserError: the template refuses it.
    """
    head, tail = template.around(comparison.prompt, comparison.tools)
    return Asked(template.render(comparison.prompt, comparison.tools), head, tail)


def write_reply(template: Template, comparison: Comparison, place: int, asked: Asked) -> Written:
    """A response with its prompt.

    Args:
        template: Writes them.
        comparison: Whose response it is.
        place: Of the response.
        asked: Its prompt.

    Raises:
        UserError: the template refuses the conversation.
        Unplaced: the template does not write the messages one after another.
    """
    reply = comparison.reply(place)
    if template.kind == "plain":
        return _plain(template, comparison, reply, asked)
    text = template.conversation(joined(comparison.prompt, reply), comparison.tools)
    if len(reply) == 1:
        return Written(text, [(_shared(text, asked.head), _end(text, asked.tail))])
    starts = [number for number, message in enumerate(reply) if message["role"] == "assistant"]
    own: list[tuple[int, int | None]] = []
    reached = 0
    for number in starts:
        messages = joined(comparison.prompt, reply[:number])
        head = asked.head if number == 0 else template.around(messages, comparison.tools)[0]
        start = _shared(text, head)
        if start < reached:
            raise Unplaced
        if number == len(reply) - 1:
            end = _end(text, asked.tail)
        else:
            whole = joined(messages, reply[number : number + 1])
            end = reached = _inner_end(template, comparison, _Before(whole, head), text, start)
        if reply[number].get("weight", 1):
            own.append((start, end))
    return Written(text, own, bool(reply[-1].get("weight", 1)))


class _Before(NamedTuple):
    """A conversation up to one of a reply's messages.

    Attributes:
        messages: That message the last.
        head: What is written before its text.
    """

    messages: list[Message]
    head: str


def _shared(text: str, head: str) -> int:
    """Characters of a conversation that the template writes whatever the reply is; no word and no mark is torn."""
    if text.startswith(head):
        return len(head)
    same = next(
        place for place, (one, other) in enumerate(zip(f"{text}\0", head, strict=False)) if one != other
    )
    begun = _BEGUN.search(head[:same])
    torn = begun is not None and any(_GOES_ON.match(other[same:]) for other in (text, head))
    return begun.start() if begun is not None and torn else same


def _end(text: str, tail: str) -> int | None:
    return len(text) - len(tail) if text.endswith(tail) else None


def _inner_end(template: Template, comparison: Comparison, before: _Before, text: str, start: int) -> int:
    """Where a message ends that others follow, its end of turn included."""
    until = template.conversation(before.messages, comparison.tools)
    if text.startswith(until.rstrip("\n")):
        return len(until.rstrip("\n"))
    # The last message of a conversation may be written in another way than one that others follow; its body is the same.
    body = until[_shared(until, before.head) :].removesuffix(template.ending.text)
    if not text.startswith(body, start):
        raise Unplaced
    end = start + len(body)
    if text.startswith(template.ending.turn, end):
        return end + len(template.ending.turn)
    mark = template.special_marks.match(text, end)
    return mark.end() if mark else end


def _plain(template: Template, comparison: Comparison, reply: Sequence[Message], asked: Asked) -> Written:
    """Messages joined as text; the assistant's are its own."""
    text, own = asked.text, list[tuple[int, int | None]]()
    for number, message in enumerate(reply):
        if message.get("tool_calls") or message.get("reasoning_content"):
            raise UserError(
                f"{comparison.source}: tokens.template: plain joins the texts of messages, and cannot write tool calls or reasoning. "
                "Write tokens.template: chat, or take them out of the data."
            )
        text += "\n\n" if number else ""
        start = len(text)
        text += template.without_end(message["content"]) if number == len(reply) - 1 else message["content"]
        if message["role"] == "assistant" and message.get("weight", 1):
            own.append((start, len(text)))
    return Written(text, own, bool(reply[-1].get("weight", 1)))


def left_out_of_reply(reply: Sequence[Message], text: str) -> list[str]:
    """Names of what a reply's messages hold and a conversation's text does not."""
    found = [name for message in reply for name in _left_out(message, text)]
    return list(dict.fromkeys(found))


def left_out_of_prompt(comparison: Comparison, text: str) -> list[str]:
    """So of a prompt and its tools; a thought of an earlier turn is left out by most templates, as it should be."""
    calls = [
        name for message in comparison.prompt for name in _left_out(message, text) if name == "tool_calls"
    ]
    tools = [tool.get("function", tool).get("name") for tool in comparison.tools]
    return [*calls[:1], *(["tools"] if any(str(name) not in text for name in tools) else [])]


def _left_out(message: Message, text: str) -> list[str]:
    if message["role"] != "assistant":
        return []
    said = {"content": message["content"], "reasoning_content": str(message.get("reasoning_content") or "")}
    missing = [name for name, own in said.items() if own.strip() and own.strip() not in text]
    calls = [call.get("function", call).get("name") for call in message.get("tool_calls") or ()]
    return missing + (["tool_calls"] if any(str(name) not in text for name in calls) else [])
