"""Where a reply stands in its conversation: which characters the assistant writes, and which the template or others do."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, cast

from tokenward.data.messages import THOUGHTS
from tokenward.errors import UserError
from tokenward.tokens.template import Template, joined
from tokenward.types import Comparison, Message

_BEGUN = re.compile(r"(<[^<>\s]*|\w+)\Z")
_GOES_ON = re.compile(r"[\w|]")
_NO_LETTERS = re.compile(r"\W+")
_PRIVATE = (
    "\ue000"  # stands for a mark's first character: of no text, of no mark, and JSON writes it as it is
)


class PromptText(NamedTuple):
    """A prompt as text.

    Attributes:
        text: As the model sees it when it generates.
        head: As it is before a reply's text in a conversation that has one; mostly the same.
        tail: What is written after a reply's text.
    """

    text: str
    head: str
    tail: str


class ConversationText(NamedTuple):
    """A whole conversation as text.

    Attributes:
        text: To its end.
        own: Characters that the assistant writes and learns, one range for each of its messages, the end of its turn
            included but for the last; the last end is None where only the tokens tell.
        ends: Whether the last range is the conversation's last message, after which its end of turn is written.
        hidden: The text with another character in each special token that the reply spells, where it spells any.
    """

    text: str
    own: list[tuple[int, int | None]]
    ends: bool = True
    hidden: str | None = None


class Unplaced(Exception):
    """A reply that cannot be found in what the template writes."""


def write_prompt(template: Template, comparison: Comparison) -> PromptText:
    """The prompt of a comparison.

    Raises:
        UserError: the template refuses it.
    """
    head, tail = template.around(comparison.prompt, comparison.tools)
    return PromptText(template.render(comparison.prompt, comparison.tools), head, tail)


def write_reply(
    template: Template, comparison: Comparison, place: int, asked: PromptText
) -> ConversationText:
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
    own: list[tuple[int, int | None]] = []
    reached = 0
    for number in (number for number, message in enumerate(reply) if message["role"] == "assistant"):
        start, end = _range(template, comparison, reply, number, text, asked)
        if start < reached:
            raise Unplaced
        reached = len(text) if end is None else end
        if reply[number].get("weight", 1):
            own.append((start, end))
    hidden = _hidden(template, comparison, reply, text)
    return ConversationText(text, own, bool(reply[-1].get("weight", 1)), hidden)


def _range(
    template: Template,
    comparison: Comparison,
    reply: Sequence[Message],
    number: int,
    text: str,
    asked: PromptText,
) -> tuple[int, int | None]:
    """Characters of one of a reply's messages."""
    before = joined(comparison.prompt, reply[:number])
    head = asked.head if not number else template.around(before, comparison.tools, begun=False)[0]
    start = _shared(text, head)
    if number == len(reply) - 1:
        return start, _end(text, asked.tail)
    whole = joined(comparison.prompt, reply[: number + 1])
    return start, _inner_end(template, comparison, _Before(whole, head), text, start)


def _hidden(template: Template, comparison: Comparison, reply: Sequence[Message], text: str) -> str | None:
    """The conversation with other characters in the special tokens that a reply spells; None where it spells none."""
    marks = template.special_marks
    if not any(marks.search(said) for message in reply for said in texts_of(message)):
        return None
    masked = [cast(Message, _changed(message, lambda said: marks.sub(_masked, said))) for message in reply]
    hidden = template.conversation(joined(comparison.prompt, masked), comparison.tools)
    # A template that writes other text for such a reply is followed as it is, marks and all.
    return hidden if len(hidden) == len(text) else None


def _masked(mark: re.Match[str]) -> str:
    return _PRIVATE + mark.group()[1:]


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """A message with a change to each of its texts but its role."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: inner if key == "role" else _changed(inner, change) for key, inner in value.items()}
    return [_changed(inner, change) for inner in value] if isinstance(value, list | tuple) else value


def texts_of(value: Any) -> Iterator[str]:
    """All texts that a message holds, but its role."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for key, inner in value.items() if key != "role" for text in texts_of(inner))
    elif isinstance(value, list | tuple):
        yield from (text for inner in value for text in texts_of(inner))


def goes_on(comparison: Comparison) -> bool:
    """Whether every reply can go on with an assistant's message that ends the prompt; so where none does."""
    last = comparison.prompt[-1] if comparison.prompt else None
    if last is None or last["role"] != "assistant":
        return True
    thinks = any(last.get(key) for key in THOUGHTS)
    replies = [comparison.reply(place)[0] for place in range(len(comparison.responses))]
    return not last.get("tool_calls") and not (
        thinks and any(one.get(key) for one in replies for key in THOUGHTS)
    )


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


def _plain(
    template: Template, comparison: Comparison, reply: Sequence[Message], asked: PromptText
) -> ConversationText:
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
    return ConversationText(text, own, bool(reply[-1].get("weight", 1)))


def left_out_of_reply(reply: Sequence[Message], text: str) -> list[str]:
    """Names of what a reply's messages hold and the text of the reply does not."""
    known = _letters(text)
    return list(dict.fromkeys(name for message in reply for name in _left_out(message, known)))


def left_out_of_prompt(comparison: Comparison, text: str) -> list[str]:
    """So of a prompt and its tools; a thought of an earlier turn is left out by most templates, as it should be."""
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
    # What an assistant thought aloud in an earlier turn is left out as a thought.
    content = message["content"].rpartition("</think>")[2]
    said = {"content": [content], **{key: [message[key]] for key in THOUGHTS if message.get(key)}}  # type: ignore[literal-required]
    said["tool_calls"] = [
        leaf for call in message.get("tool_calls") or () for leaf in _leaves(call.get("function", call))
    ]
    return [name for name, texts in said.items() if not all(_is_known(text, known) for text in texts)]


def _leaves(value: Any) -> Iterator[str]:
    """Names and values of a call."""
    if isinstance(value, str) and value.strip().startswith("{"):
        with suppress(ValueError):  # no JSON: it is a text
            value = json.loads(value)
    if isinstance(value, Mapping):
        yield from (leaf for inner in value.values() for leaf in _leaves(inner))
    elif isinstance(value, list | tuple):
        yield from (leaf for inner in value for leaf in _leaves(inner))
    elif value is not None and not isinstance(value, bool):
        yield str(value)


def _is_known(text: Any, known: str) -> bool:
    """Whether a text is written, perhaps as JSON or with other white space and punctuation."""
    forms = (str(text), json.dumps(str(text)), json.dumps(str(text), ensure_ascii=False))
    return any(_letters(form) in known for form in forms)


def _letters(text: str) -> str:
    return _NO_LETTERS.sub("", text)
