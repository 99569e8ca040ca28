"""Prompt and reply out of conversations: shared beginnings and Human/Assistant transcripts."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from tokenward.data.fields import Row, Unusable, required, text
from tokenward.data.messages import Conversation, is_plain, readable, text_or_messages
from tokenward.types import Message

NO_SHARED_PROMPT = "no shared prompt"

_MARKER = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class DataReply(NamedTuple):
    """A reply as a person reads it, and its messages where they are more than that text."""

    text: str
    turns: Conversation | None = None


class Sides(NamedTuple):
    """A prompt and its two replies."""

    prompt: Conversation
    chosen: DataReply
    rejected: DataReply


def user(content: str) -> Conversation:
    """A conversation of one user message."""
    return ({"role": "user", "content": content},)


def is_transcript(value: object) -> bool:
    """Whether this is Anthropic HH's text form of a conversation, which begins with ``Human:``."""
    if not isinstance(value, str) or not value.lstrip().startswith("Human:"):
        return False
    return value.startswith("\n\n") or "\n\nAssistant:" in value


def turns(transcript: str) -> Conversation:
    """The messages of a transcript; text before the first marker becomes a system message.

    White space around a turn belongs to the notation and is stripped.
    """
    preamble, *parts = _MARKER.split("\n\n" + transcript.lstrip())
    messages = [Message(role="system", content=preamble.strip())] if preamble.strip() else []
    for role, content in zip(parts[::2], parts[1::2], strict=True):
        messages.append(Message(role=_ROLES[role], content=content.strip()))
    return tuple(messages)


def prompt_of(row: Row) -> Conversation:
    """The field ``prompt`` as messages: plain text is one user message, a transcript its turns.

    Raises:
        FieldError: It is missing, null, or neither text nor messages.
    """
    value = text_or_messages(required(row, "prompt"), "prompt")
    if not isinstance(value, str):
        return value
    if not is_transcript(value):
        return user(value)
    prompt = turns(value)
    opened = (
        prompt[-1]["role"] == "assistant" and not prompt[-1]["content"]
    )  # "\n\nAssistant:" asks for the reply
    return prompt[:-1] if opened else prompt


def reply(value: str | Conversation, prompt: Conversation) -> DataReply:
    """A reply given as text or as messages, which may begin with the prompt.

    Raises:
        Unusable: There is none, or it does not begin and end with the assistant.
    """
    if isinstance(value, str):
        return DataReply(value)
    rest = after(prompt, value)
    if not rest:
        raise Unusable("empty response")
    if rest[0]["role"] != "assistant":
        raise Unusable("response is not the assistant's")
    if rest[-1]["role"] != "assistant":
        raise Unusable("response does not end with the assistant")
    return DataReply(rest[0]["content"]) if is_plain(rest) else DataReply(readable(rest), rest)


def after(prompt: Conversation, value: Conversation) -> Conversation:
    """The messages that follow a prompt, where they begin with it."""
    return value[len(prompt) :] if prompt and value[: len(prompt)] == prompt else value


def shared_prompt(chosen: Conversation, rejected: Conversation) -> Conversation:
    """The messages with which both begin, up to a reply of the assistant in each; may be empty."""
    same = len(_same(chosen, rejected))
    while same and not (chosen[same]["role"] == rejected[same]["role"] == "assistant"):
        same -= 1
    return chosen[:same]


def _same(chosen: Conversation, rejected: Conversation) -> Conversation:
    """The messages with which both begin, leaving each at least one."""
    limit = min(len(chosen), len(rejected)) - 1
    same = next((i for i in range(limit) if chosen[i] != rejected[i]), max(limit, 0))
    return chosen[:same]


def from_transcripts(row: Row) -> Sides:
    """Anthropic HH: the prompt is the longest shared beginning that ends in a Human turn.

    Raises:
        FieldError: A side is missing, null or no text.
        Unusable: There is no such beginning, or more than one message follows it.
    """
    chosen, rejected = (turns(text(required(row, side), side)) for side in ("chosen", "rejected"))
    prompt = _same(chosen, rejected)
    while prompt and prompt[-1]["role"] != "user":
        prompt = prompt[:-1]
    if not prompt:
        raise Unusable(NO_SHARED_PROMPT)
    return Sides(prompt, _single(chosen[len(prompt) :]), _single(rejected[len(prompt) :]))


def _single(rest: Sequence[Message]) -> DataReply:
    # A transcript that goes on in two ways says which course of a talk was better, not which reply.
    if len(rest) > 1:
        raise Unusable("response has several messages")
    if rest[0]["role"] != "assistant":
        raise Unusable("response is not the assistant's")
    return DataReply(rest[0]["content"])


def from_shared_beginning(row: Row) -> Sides:
    """The implicit prompt: what ``chosen`` and ``rejected`` begin with, as messages or as plain text.

    Plain text is cut at a space so that no word is split; the space stays with the replies, so prompt and
    reply joined are the text as given. (TRL cuts at the first differing character and may split a word.)

    Raises:
        FieldError: A side is missing, null, or neither text nor messages.
        Unusable: They begin differently, or more than one message follows.
    """
    chosen, rejected = (text_or_messages(required(row, side), side) for side in ("chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        cut = _shared_words(chosen, rejected)
        if not chosen[:cut].strip():
            raise Unusable(NO_SHARED_PROMPT)
        return Sides(user(chosen[:cut]), DataReply(chosen[cut:]), DataReply(rejected[cut:]))
    prompt = () if isinstance(chosen, str) or isinstance(rejected, str) else shared_prompt(chosen, rejected)
    if not prompt:
        raise Unusable(NO_SHARED_PROMPT)
    return Sides(prompt, reply(chosen, prompt), reply(rejected, prompt))


def from_pair(row: Row) -> Sides:
    """``prompt``, ``chosen`` and ``rejected``; where the sides are whole conversations they give the prompt.

    Raises:
        FieldError: A field is missing, null, or neither text nor messages.
        Unusable: The conversations are not about this prompt, or a side is no reply.
    """
    prompt = prompt_of(row)
    chosen, rejected = (text_or_messages(required(row, side), side) for side in ("chosen", "rejected"))
    if not isinstance(chosen, str) and not isinstance(rejected, str):
        if isinstance(row["prompt"], str):
            prompt = _whole_prompt(prompt, shared_prompt(chosen, rejected))
        sides = sides_of(prompt, chosen, rejected)
    else:
        sides = Sides(prompt, reply(chosen, prompt), reply(rejected, prompt))
    if is_transcript(row["prompt"]):  # the space after "Assistant:" belongs to the notation
        return Sides(sides.prompt, *(side._replace(text=side.text.strip()) for side in sides[1:]))
    return sides


def sides_of(prompt: Conversation, chosen: Conversation, rejected: Conversation) -> Sides:
    """Two replies as messages, each of which may begin with the prompt; what both say first belongs to the prompt.

    Raises:
        Unusable: A side is no reply.
    """
    first, second = after(prompt, chosen), after(prompt, rejected)
    replies = [side[0]["role"] == "assistant" for side in (first, second) if side]
    shared = shared_prompt(first, second) if all(replies) else ()  # else they are not about this prompt
    return Sides(prompt + shared, reply(first, shared), reply(second, shared))


def _whole_prompt(prompt: Conversation, shared: Conversation) -> Conversation:
    """The shared messages when they hold the prompt's text (and perhaps a system message more)."""
    if not shared or not prompt:
        return prompt
    asked = prompt[-1]["content"].strip()
    if all(message["content"].strip() != asked for message in shared):
        raise Unusable("prompt differs from the conversation")
    return shared


def _shared_words(chosen: str, rejected: str) -> int:
    """How many characters both begin with, up to the last white space among them.

    A space there goes to the replies; a line break closes the prompt.
    """
    length = min(len(chosen), len(rejected))
    same = next((i for i in range(length) if chosen[i] != rejected[i]), length)
    breaks = [match.start() for match in re.finditer(r"\s", chosen[:same])]
    if not breaks:
        return 0
    return breaks[-1] if chosen[breaks[-1]] == " " else breaks[-1] + 1
