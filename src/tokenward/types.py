"""The data that travels between stages, and the letters used for tensor shapes.

Shapes: ``b`` comparisons, ``k`` responses of a comparison, ``r`` responses of a batch, ``n`` response tokens of a batch,
concatenated, ``t`` positions of a padded row, ``v`` vocabulary, ``d`` hidden size. Per-token values are ragged: a flat
``[n]`` tensor plus ``response [n]``, the index of the response that owns each token. Rewards and log-probabilities are
float32, in nats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

Precision = Literal["float32", "bfloat16"]
"""Number type of a forward pass: that of the weights (``float32``), or ``bfloat16`` under autocast."""


class Message(TypedDict):
    """One turn of a conversation.

    Further keys are kept and reach the chat template.

    Attributes:
        role: ``system``, ``user``, ``assistant`` or ``tool``.
        content: The text; empty if the row has none, for example next to tool calls.
        name: Name of the speaker.
        tool_calls: Calls of tools by the assistant.
        tool_call_id: Id of the call that a tool message answers.
        reasoning_content: Reasoning of the assistant.
        weight: 0 leaves an assistant message out of the loss. The template never sees it.
    """

    role: str
    content: str
    name: NotRequired[str]
    tool_calls: NotRequired[Sequence[Mapping[str, Any]]]
    tool_call_id: NotRequired[str]
    reasoning_content: NotRequired[str]
    weight: NotRequired[int]


class Span(NamedTuple):
    """A value for the characters ``start`` to ``end`` (exclusive) of a response."""

    start: int
    end: int
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One prompt with ranked responses: two or more, or a single one that is good (rank 0) or bad (rank 1).

    Attributes:
        key: Stable name: a hash of the prompt and responses, independent of the row's position.
        prompt: The conversation before the response.
        responses: The text of each response.
        ranks: Rank of each response; 0 is the best, equal ranks are ties.
        source: Origin of the row as ``file:line``, for messages.
        scores: Score of each response according to the data, if known.
        spans: Annotated character spans of each response, if the data has any.
        turns: Messages of each response. None, for one response or for all, means a single assistant message that
            holds the text.
        tools: Tools the assistant may call, as the row gives them.
    """

    key: str
    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    source: str
    scores: tuple[float, ...] | None = None
    spans: tuple[tuple[Span, ...], ...] | None = None
    turns: tuple[tuple[Message, ...] | None, ...] | None = None
    tools: tuple[Mapping[str, Any], ...] = ()

    def reply(self, place: int) -> tuple[Message, ...]:
        """The messages of the response with this index."""
        own = self.turns[place] if self.turns is not None else None
        return own if own is not None else (Message(role="assistant", content=self.responses[place]),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A prompt to sample responses for, with what is needed to judge them.

    Attributes:
        key: Stable name of the row.
        prompt: The conversation before the response; empty if the response starts the text.
        source: Origin of the row as ``file:line``, for messages.
        references: Reference texts; the first is the one to learn from.
        columns: The other columns of the row, for the preference source.
        tools: Tools the assistant may call, as the row gives them.
    """

    key: str
    prompt: tuple[Message, ...]
    source: str
    references: tuple[str, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tools: tuple[Mapping[str, Any], ...] = ()
