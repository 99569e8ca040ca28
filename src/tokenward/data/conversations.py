"""Splits conversations into prompt and replies: common beginnings and Human/Assistant transcripts.

A malformed field raises a FieldError, and a row without two comparable replies raises Unusable with the reason.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from tokenward.data.fields import Row, Unusable, read, text
from tokenward.data.messages import Conversation, is_plain, readable, text_or_messages
from tokenward.types import Message

NO_SHARED_PROMPT = "no shared prompt"
SIDES = ("chosen", "rejected")

_MARKER = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class DataReply(NamedTuple):
    """A reply as readable text, and its messages if they contain more than that text."""

    text: str
    turns: Conversation | None = None


class Sides(NamedTuple):
    """A prompt and its two replies."""

    prompt: Conversation
    chosen: DataReply
    rejected: DataReply


def user(content: str) -> Conversation:
    """A conversation with a single user message."""
    return ({"role": "user", "content": content},)


def is_transcript(value: object) -> bool:
    """Whether the value is a conversation in the text format of Anthropic HH, which starts with ``Human:``."""
    if not isinstance(value, str) or not value.lstrip().startswith("Human:"):
        return False
    return value.startswith("\n\n") or "\n\nAssistant:" in value


def turns(transcript: str) -> Conversation:
    """The messages of a transcript. Text before the first marker becomes a system message.

    White space around a turn is part of the notation and is stripped.
    """
    preamble, *parts = _MARKER.split("\n\n" + transcript.lstrip())
    messages = [Message(role="system", content=preamble.strip())] if preamble.strip() else []
    for role, content in zip(parts[::2], parts[1::2], strict=True):
        messages.append(Message(role=_ROLES[role], content=content.strip()))
    return tuple(messages)


def prompt_of(row: Row) -> Conversation:
    """The field ``prompt`` as messages. Plain text becomes one user message, a transcript becomes its turns."""
    value = read(row, "prompt", text_or_messages)
    if not isinstance(value, str):
        return value
    if not is_transcript(value):
        return user(value)
    prompt = turns(value)
    # An empty Assistant turn at the end only asks for the reply.
    return prompt[:-1] if prompt[-1] == {"role": "assistant", "content": ""} else prompt


def reply(value: str | Conversation, prompt: Conversation) -> DataReply:
    """A reply given as text or as messages, which may repeat the prompt."""
    if isinstance(value, str):
        return DataReply(value)
    rest = _after(prompt, value)
    if not rest:
        raise Unusable("empty response")
    if rest[0]["role"] != "assistant":
        raise Unusable("response is not the assistant's")
    if rest[-1]["role"] != "assistant":
        raise Unusable("response does not end with the assistant")
    return DataReply(rest[0]["content"]) if is_plain(rest) else DataReply(readable(rest), rest)


def shared_prompt(chosen: Conversation, rejected: Conversation) -> Conversation:
    """The longest common beginning that is followed by an assistant message on both sides; may be empty."""
    same = len(_common(chosen, rejected))
    while same and not (chosen[same]["role"] == rejected[same]["role"] == "assistant"):
        same -= 1
    return chosen[:same]


def from_transcripts(row: Row) -> Sides:
    """Anthropic HH: the prompt is the longest common beginning that ends in a Human turn."""
    chosen, rejected = (turns(read(row, side, text)) for side in SIDES)
    prompt = _common(chosen, rejected)
    while prompt and prompt[-1]["role"] != "user":
        prompt = prompt[:-1]
    if not prompt:
        raise Unusable(NO_SHARED_PROMPT)
    return Sides(prompt, _single(chosen[len(prompt) :]), _single(rejected[len(prompt) :]))


def from_shared_beginning(row: Row) -> Sides:
    """Implicit prompt: the common beginning of ``chosen`` and ``rejected``, as messages or as plain text.

    Plain text is cut at a space, so that no word is split. The space goes to the replies: prompt and reply joined are
    the original text. (TRL cuts at the first different character and can split a word.)
    """
    chosen, rejected = (read(row, side, text_or_messages) for side in SIDES)
    if isinstance(chosen, str) and isinstance(rejected, str):
        cut = _common_words(chosen, rejected)
        if not chosen[:cut].strip():
            raise Unusable(NO_SHARED_PROMPT)
        return Sides(user(chosen[:cut]), DataReply(chosen[cut:]), DataReply(rejected[cut:]))
    prompt = () if isinstance(chosen, str) or isinstance(rejected, str) else shared_prompt(chosen, rejected)
    if not prompt:
        raise Unusable(NO_SHARED_PROMPT)
    return Sides(prompt, reply(chosen, prompt), reply(rejected, prompt))


def from_pair(row: Row) -> Sides:
    """``prompt``, ``chosen`` and ``rejected``. If the sides are whole conversations, they contain the prompt."""
    prompt = prompt_of(row)
    chosen, rejected = (read(row, side, text_or_messages) for side in SIDES)
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
    """Two replies as messages, which may repeat the prompt. Their common first messages are moved to the prompt."""
    first, second = _after(prompt, chosen), _after(prompt, rejected)
    # A side that does not start with the assistant is about another prompt: nothing is shared.
    replies = all(side[0]["role"] == "assistant" for side in (first, second) if side)
    shared = shared_prompt(first, second) if replies else ()
    return Sides(prompt + shared, reply(first, shared), reply(second, shared))


def _after(prompt: Conversation, value: Conversation) -> Conversation:
    return value[len(prompt) :] if prompt and value[: len(prompt)] == prompt else value


def _common(chosen: Conversation, rejected: Conversation) -> Conversation:
    """The common first messages; at least one message is left to each side."""
    limit = min(len(chosen), len(rejected)) - 1
    same = next((i for i in range(limit) if chosen[i] != rejected[i]), max(limit, 0))
    return chosen[:same]


def _single(rest: Sequence[Message]) -> DataReply:
    # Transcripts that differ in several turns compare two conversations, not two replies.
    if len(rest) > 1:
        raise Unusable("response has several messages")
    if rest[0]["role"] != "assistant":
        raise Unusable("response is not the assistant's")
    return DataReply(rest[0]["content"])


def _whole_prompt(prompt: Conversation, shared: Conversation) -> Conversation:
    """The shared messages if they contain the prompt's text, perhaps with a system message in front."""
    if not shared or not prompt:
        return prompt
    question = prompt[-1]["content"].strip()
    if all(message["content"].strip() != question for message in shared):
        raise Unusable("prompt differs from the conversation")
    return shared


def _common_words(chosen: str, rejected: str) -> int:
    """Number of characters both texts start with, up to the last white space among them.

    A space is left to the replies; a line break stays in the prompt.
    """
    length = min(len(chosen), len(rejected))
    same = next((i for i in range(length) if chosen[i] != rejected[i]), length)
    breaks = [match.start() for match in re.finditer(r"\s", chosen[:same])]
    if not breaks:
        return 0
    return breaks[-1] if chosen[breaks[-1]] == " " else breaks[-1] + 1
