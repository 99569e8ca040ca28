"""The data that travels between stages, and the glossary of shapes.

Shapes: ``b`` comparisons, ``k`` responses, ``n`` response tokens of a batch laid end to end,
``r`` responses of a batch, ``t`` positions of a padded row, ``v`` vocabulary, ``d`` width.
Per-token values are ragged: a flat ``[n]`` tensor and ``response [n]``, which response owns each
token. Rewards and log-probabilities are in nats, float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NotRequired, TypedDict


class Message(TypedDict):
    """One turn of a conversation.

    Other fields of a row's message are kept and reach the chat template.

    Attributes:
        role: ``system``, ``user``, ``assistant`` or ``tool``.
        content: The text; empty if the row has none, such as beside tool calls.
        name: Name of the speaker.
        tool_calls: Calls of tools by the assistant.
        tool_call_id: Id of the call that a tool message answers.
        reasoning_content: Reasoning of the assistant.
        weight: 0 leaves an assistant message out of the loss. Never shown to the template.
    """

    role: str
    content: str
    name: NotRequired[str]
    tool_calls: NotRequired[Sequence[Mapping[str, Any]]]
    tool_call_id: NotRequired[str]
    reasoning_content: NotRequired[str]
    weight: NotRequired[int]


class Span(NamedTuple):
    """A piece of a response with a known value: characters ``start`` to ``end`` (exclusive)."""

    start: int
    end: int
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One prompt with K responses and their ranks: K >= 2, or one that is good (0) or bad (1).

    Attributes:
        key: Stable name of the row: a hash of prompt and responses, the same wherever it stands.
        prompt: The conversation up to the reply.
        responses: The K replies as a person reads them.
        ranks: One per response; 0 is the best, equal ranks are a tie.
        source: Where the row came from, as ``file:line``, for messages to the user.
        scores: What the preference source gave each response, where the data says it.
        spans: Per response, the character spans whose value is known, where the data says it.
        turns: Per response its messages, or None where it is one message of the assistant that holds its text and
            nothing else; None where all are so.
        tools: What the assistant may call, as the row has it.
    """

    key: str
    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    source: str
    scores: tuple[float, ...] | None = None
    spans: tuple[tuple[Span, ...], ...] | None = field(default=None)
    turns: tuple[tuple[Message, ...] | None, ...] | None = None
    tools: tuple[Mapping[str, Any], ...] = ()

    def reply(self, place: int) -> tuple[Message, ...]:
        """The messages of a response, given its place."""
        own = self.turns[place] if self.turns is not None else None
        return own if own is not None else (Message(role="assistant", content=self.responses[place]),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A prompt to sample replies to, and what its replies are judged by.

    Attributes:
        key: Stable name of the row.
        prompt: The conversation up to the reply; empty where the reply begins the text.
        source: Where the row came from, as ``file:line``, for messages to the user.
        references: Texts that a good reply is like; the first is the one to learn from.
        columns: The row's other columns, for the preference source.
        tools: What the assistant may call, as the row has it.
    """

    key: str
    prompt: tuple[Message, ...]
    source: str
    references: tuple[str, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tools: tuple[Mapping[str, Any], ...] = ()
