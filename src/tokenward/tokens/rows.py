"""A comparison as token ids, with known values per token."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

from torch import Tensor

from tokenward.tokens.split import Insert
from tokenward.types import Comparison, Message

Layout = Literal["shared", "separate", "encoder_decoder"]
"""How rows are laid out for a model; see :mod:`tokenward.tokens.layouts`."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A comparison as token ids. Values per token are lists with one entry per response.

    Attributes:
        comparison: The comparison that was encoded.
        prompt: Ids of the prompt.
        responses: Ids of each response: the tokens of the assistant, with the eos tokens unless the response was cut.
        eos: Number of eos tokens at the end of each response; 0 if it was cut.
        context: For each response, the tokens inside it that are not the assistant's: what the template writes between
            prompt and reply, and messages of others. Empty if no response has any.
        opening: Ids that follow the prompt for generation, but not in the rows; usually empty.
        weights: ``[len]`` per response; None means 1 everywhere.
        reference_logp: ``[len]`` per response, nats, or None.
        scores: ``[len]`` per response, or None.
        segments: ``[len]`` integers per response, constant within a segment and increasing, or None.
        values: More values by name, ``[len]`` per response each.
    """

    comparison: Comparison
    prompt: list[int]
    responses: list[list[int]]
    eos: list[int]
    context: Sequence[Sequence[Insert]] = ()
    opening: Sequence[int] = ()
    _: KW_ONLY
    weights: Sequence[Tensor] | None = None
    reference_logp: Sequence[Tensor] | None = None
    scores: Sequence[Tensor] | None = None
    segments: Sequence[Tensor] | None = None
    values: Mapping[str, Sequence[Tensor]] = field(default_factory=dict[str, Sequence[Tensor]])

    @property
    def length(self) -> int:
        """Number of tokens in the shared layout."""
        return len(self.prompt) + sum(map(self.size, range(len(self.responses))))

    @property
    def asked(self) -> list[int]:
        """Ids that the model reads before it generates a reply."""
        return [*self.prompt, *self.opening]

    def inserts(self, place: int) -> Sequence[Insert]:
        """The tokens in a response that are not the assistant's."""
        return self.context[place] if self.context else ()

    def size(self, place: int) -> int:
        """Number of tokens that the model reads for a response, inserts included."""
        return len(self.responses[place]) + sum(len(insert.ids) for insert in self.inserts(place))

    def only(self, place: int) -> "TokenRow":
        """The row with a single response and without values. The comparison is unchanged."""
        one = slice(place, place + 1)
        return TokenRow(
            self.comparison, self.prompt, self.responses[one], self.eos[one], self.context[one], self.opening
        )

    def whole(self, place: int) -> tuple[list[int], list[int]]:
        """All ids that the model reads for a response, and the positions of the assistant's tokens among them."""
        own, inserts = self.responses[place], self.inserts(place)
        ids, places, before = list[int](), list[int](), 0
        for insert in (*inserts, Insert(len(own), [])):
            places += range(len(ids), len(ids) + insert.before - before)
            ids += own[before : insert.before]
            ids += insert.ids
            before = insert.before
        return ids, places

    def shape(self, layout: Layout) -> tuple[int, int]:
        """Number of rows that the comparison takes in a batch, and the length of the longest.

        In the shared layout comparisons are concatenated, and the length is that of the comparison.
        """
        if layout == "shared":
            return 1, self.length
        # A decoder reads a start token before the response.
        count, start = len(self.responses), int(layout == "encoder_decoder")
        return count, len(self.prompt) + max(map(self.size, range(count))) + start


def response_key(
    prompt: Sequence[Message],
    response: str | Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The stable name of a response to a prompt, 16 hexadecimal digits.

    Args:
        prompt: Its messages.
        response: The text, or the messages if they contain more than one text of the assistant.
        tools: The tools that the assistant may call.
    """
    return response_keys(prompt, [response], tools)[0]


_KEYED = json.JSONEncoder(ensure_ascii=False, sort_keys=True)


def response_keys(
    prompt: Sequence[Message],
    responses: Sequence[str | Sequence[Message]],
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[str]:
    """:func:`response_key` of several responses to one prompt."""
    before, after = f"[{_KEYED.encode(list(prompt))}, ", f", {_KEYED.encode(list(tools))}]" if tools else "]"
    written = (_KEYED.encode(own if isinstance(own, str) else list(own)) for own in responses)
    return [hashlib.sha256(f"{before}{text}{after}".encode()).hexdigest()[:16] for text in written]


def keys_of(comparison: Comparison) -> list[str]:
    """The stable names of the responses of a comparison."""
    return response_keys(comparison.prompt, _named(comparison), comparison.tools)


def prompt_and_response_keys(comparison: Comparison) -> list[str]:
    """The stable name of a comparison's prompt, which is that of an empty response to it, and those of its responses."""
    return response_keys(comparison.prompt, ["", *_named(comparison)], comparison.tools)


def _named(comparison: Comparison) -> list[str | Sequence[Message]]:
    turns = comparison.turns or (None,) * len(comparison.responses)
    both = zip(comparison.responses, turns, strict=True)
    return [text if own is None else own for text, own in both]
