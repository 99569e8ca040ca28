"""Locates replies in the text of a conversation: which characters are the assistant's, the template's, or others'."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, cast

from tokenward.data.messages import THOUGHTS
from tokenward.errors import UserError
from tokenward.tokens.template import Template, joined
from tokenward.types import Comparison, Message

_PARTIAL_MARK = re.compile(r"(<[^<>\s]*|\w+)\Z")
_CONTINUES = re.compile(r"[\w|]")
_NO_LETTERS = re.compile(r"\W+")
_PRIVATE = (
    "\ue000"  # replaces the first character of a mark: no text or mark has it, and JSON does not escape it
)


class PromptText(NamedTuple):
    """A prompt as text."""

    text: str  # the prompt for generation
    head: str  # the prompt in a conversation that has a reply, up to the reply's text; usually the same
    tail: str  # the text after a reply


class ConversationText(NamedTuple):
    """A whole conversation as text."""

    text: str  # the complete text
    # Ranges of characters that the assistant learns, one per message, with the end of its turn except for the last
    # message. The last end is None if only the tokens tell it.
    own: list[tuple[int, int | None]]
    ends: bool = True  # whether the last range is the last message, after which an eos follows
    # The text with another character in each special token that the reply spells; None if it spells none.
    hidden: str | None = None


class Unplaced(Exception):
    """A reply cannot be located in the text that the template writes."""


def write_prompt(template: Template, comparison: Comparison) -> PromptText:
    """The prompt of a comparison.

    Raises:
        UserError: The template refuses it.
    """
    head, tail = template.around(comparison.prompt, comparison.tools)
    return PromptText(template.render(comparison.prompt, comparison.tools), head, tail)


def write_reply(
    template: Template, comparison: Comparison, place: int, prompt: PromptText
) -> ConversationText:
    """A response with its prompt, given its position in the comparison.

    Raises:
        UserError: The template refuses the conversation.
        Unplaced: The template does not write the messages one after another.
    """
    reply = comparison.reply(place)
    if template.kind == "plain":
        return _plain(template, comparison, reply, prompt)
    text = template.conversation(joined(comparison.prompt, reply), comparison.tools)
    own: list[tuple[int, int | None]] = []
    reached = 0
    for number, message in enumerate(reply):
        if message["role"] != "assistant":
            continue
        start, end = _range(template, comparison, reply, number, text, prompt)
        if start < reached:
            raise Unplaced
        reached = len(text) if end is None else end
        if message.get("weight", 1):
            own.append((start, end))
    hidden = _hidden(template, comparison, reply, text)
    return ConversationText(text, own, bool(reply[-1].get("weight", 1)), hidden)


def _range(
    template: Template,
    comparison: Comparison,
    reply: Sequence[Message],
    number: int,
    text: str,
    prompt: PromptText,
) -> tuple[int, int | None]:
    """Characters of one of a reply's messages."""
    before = joined(comparison.prompt, reply[:number])
    head = template.around(before, comparison.tools, begun=False)[0] if number else prompt.head
    start = _shared(text, head)
    if number == len(reply) - 1:
        return start, len(text) - len(prompt.tail) if text.endswith(prompt.tail) else None
    until = template.conversation(joined(comparison.prompt, reply[: number + 1]), comparison.tools)
    if text.startswith(until.rstrip("\n")):
        return start, len(until.rstrip("\n"))
    # A template can write the last message of a conversation in another way than earlier ones; its body is the same.
    body = until[_shared(until, head) :].removesuffix(template.ending.text)
    if not text.startswith(body, start):
        raise Unplaced
    end = start + len(body)
    if text.startswith(template.ending.turn, end):
        return start, end + len(template.ending.turn)
    mark = template.special_marks.match(text, end)
    return start, mark.end() if mark else end


def _shared(text: str, head: str) -> int:
    """Number of first characters that do not depend on the reply. A word or mark is never split."""
    if text.startswith(head):
        return len(head)
    same = next(
        place for place, (one, other) in enumerate(zip(f"{text}\0", head, strict=False)) if one != other
    )
    partial = _PARTIAL_MARK.search(head[:same])
    split = partial is not None and any(_CONTINUES.match(other[same:]) for other in (text, head))
    return partial.start() if partial is not None and split else same


def _hidden(template: Template, comparison: Comparison, reply: Sequence[Message], text: str) -> str | None:
    """The conversation with other characters in the special tokens that a reply spells; None if it spells none."""
    marks = template.special_marks
    if not any(marks.search(spelled) for message in reply for spelled in texts_of(message)):
        return None

    def mask(spelled: str) -> str:
        return marks.sub(lambda mark: _PRIVATE + mark.group()[1:], spelled)

    masked = [cast(Message, _mapped(message, mask)) for message in reply]
    hidden = template.conversation(joined(comparison.prompt, masked), comparison.tools)
    # If the template writes other text for such a reply, its marks stay marks.
    return hidden if len(hidden) == len(text) else None


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A message with a function applied to each of its texts except the role."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: inner if key == "role" else _mapped(inner, change) for key, inner in value.items()}
    return [_mapped(inner, change) for inner in value] if isinstance(value, list | tuple) else value


def texts_of(value: Any) -> Iterator[str]:
    """All texts of a message except the role."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for key, inner in value.items() if key != "role" for text in texts_of(inner))
    elif isinstance(value, list | tuple):
        yield from (text for inner in value for text in texts_of(inner))


def is_continuable(comparison: Comparison) -> bool:
    """Whether the replies can continue the prompt's last message, or the prompt does not end with the assistant.

    A reply cannot continue a call, or reasoning if it has reasoning of its own.
    """
    last = comparison.prompt[-1] if comparison.prompt else None
    if last is None or last["role"] != "assistant":
        return True
    replies = [comparison.reply(place)[0] for place in range(len(comparison.responses))]
    reasons = [any(message.get(key) for key in THOUGHTS) for message in (last, *replies)]
    return not last.get("tool_calls") and not (reasons[0] and any(reasons[1:]))


def _plain(
    template: Template, comparison: Comparison, reply: Sequence[Message], prompt: PromptText
) -> ConversationText:
    text, own = prompt.text, list[tuple[int, int | None]]()
    for number, message in enumerate(reply):
        if message.get("tool_calls") or message.get("reasoning_content"):
            raise UserError(
                f"{comparison.source}: template: plain joins the texts of messages, and cannot write tool calls or reasoning. "
                "Use template: chat, or remove them from the data.",
                code="plain-template",
                key="tokens.template",
            )
        text += "\n\n" if number else ""
        start = len(text)
        text += template.without_end(message["content"]) if number == len(reply) - 1 else message["content"]
        if message["role"] == "assistant" and message.get("weight", 1):
            own.append((start, len(text)))
    return ConversationText(text, own, bool(reply[-1].get("weight", 1)))


def left_out_of_reply(reply: Sequence[Message], text: str) -> list[str]:
    """Names of the parts of a reply's messages that the text of the reply does not contain."""
    known = _letters(text)
    return list(dict.fromkeys(name for message in reply for name in _left_out(message, known)))


def left_out_of_prompt(comparison: Comparison, text: str) -> list[str]:
    """Names of the parts of a prompt and its tools that the text does not contain.

    Reasoning does not count: most templates correctly leave it out of earlier turns.
    """
    known = _letters(text)
    found = [
        f"a message of {message['role']}" if name == "content" else name
        for message in comparison.prompt
        for name in _left_out(message, known)
        if name not in THOUGHTS
    ]
    names = [str(tool.get("function", tool).get("name")) for tool in comparison.tools]
    found += ["tools"] if any(_letters(name) not in known for name in names) else []
    return list(dict.fromkeys(found))


def _left_out(message: Message, known: str) -> list[str]:
    # Templates also remove reasoning that is part of the content of an earlier turn.
    content = message["content"].rpartition("</think>")[2]
    parts = {"content": [content], **{key: [message[key]] for key in THOUGHTS if message.get(key)}}  # type: ignore[literal-required]
    parts["tool_calls"] = [
        leaf for call in message.get("tool_calls") or () for leaf in _leaves(call.get("function", call))
    ]
    return [name for name, texts in parts.items() if not all(_is_known(text, known) for text in texts)]


def _leaves(value: Any) -> Iterator[str]:
    """Names and values of a call."""
    if isinstance(value, str) and value.strip().startswith("{"):
        with suppress(ValueError):  # text that only looks like JSON
            value = json.loads(value)
    if isinstance(value, Mapping):
        yield from (leaf for inner in value.values() for leaf in _leaves(inner))
    elif isinstance(value, list | tuple):
        yield from (leaf for inner in value for leaf in _leaves(inner))
    elif value is not None and not isinstance(value, bool):
        yield str(value)


def _is_known(text: Any, known: str) -> bool:
    """Whether a text is written, possibly as JSON or with other white space and punctuation."""
    forms = (str(text), json.dumps(str(text)), json.dumps(str(text), ensure_ascii=False))
    return any(_letters(form) in known for form in forms)


def _letters(text: str) -> str:
    return _NO_LETTERS.sub("", text)
