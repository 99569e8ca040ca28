"""A comparison as token ids with known values per token."""

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
        responses: Ids of each response: what the assistant writes, end-of-turn tokens included unless it was cut.
        eos: How many tokens at the end of each response are end-of-turn tokens; 0 if it was cut.
        context: Per response the ids in it that the assistant does not write: what the template writes between the
            prompt and the reply, and messages of others. Empty if no response has any.
        opening: Ids that follow the prompt when the model generates but not in the rows; mostly empty.
        weights: ``[len]`` per response, or None for 1 everywhere.
        reference_logp: ``[len]`` per response, nats, or None.
        scores: ``[len]`` per response, or None.
        segments: ``[len]`` whole numbers per response, equal within a segment and rising, or None.
        values: Further values by name, ``[len]`` per response each.
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
        """Tokens of the comparison as one shared row."""
        return len(self.prompt) + sum(map(self.size, range(len(self.responses))))

    @property
    def asked(self) -> list[int]:
        """What the model reads before it generates a reply."""
        return [*self.prompt, *self.opening]

    def inserts(self, place: int) -> Sequence[Insert]:
        """What stands in a response beside its own tokens."""
        return self.context[place] if self.context else ()

    def size(self, place: int) -> int:
        """Tokens that the model reads for a response, its own and the others."""
        return len(self.responses[place]) + sum(len(insert.ids) for insert in self.inserts(place))

    def only(self, place: int) -> "TokenRow":
        """The same with one of its responses alone; the comparison stays."""
        mine = slice(place, place + 1)
        return TokenRow(
            self.comparison,
            self.prompt,
            self.responses[mine],
            self.eos[mine],
            self.context[mine],
            self.opening,
        )

    def whole(self, place: int) -> tuple[list[int], list[int]]:
        """All ids that the model reads for a response, and the place of each of its own among them."""
        own = self.responses[place]
        inserts = self.inserts(place)
        if not inserts:
            return own, list(range(len(own)))
        ids, places, before = list[int](), list[int](), 0
        for insert in (*inserts, Insert(len(own), [])):
            places += range(len(ids), len(ids) + insert.before - before)
            ids += own[before : insert.before]
            ids += insert.ids
            before = insert.before
        return ids, places

    def shape(self, layout: Layout) -> tuple[int, int]:
        """Rows that this comparison takes in a batch, and the width of the widest.

        In the shared layout rows are laid end to end, and the width is the comparison's length.
        """
        if layout == "shared":
            return 1, self.length
        if layout == "encoder_decoder":
            longest = max(map(len, self.responses))
            return len(self.responses), len(self.prompt) + longest + 1
        longest = max(map(self.size, range(len(self.responses))))
        return len(self.responses), len(self.prompt) + longest


def response_key(
    prompt: Sequence[Message],
    response: str | Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Stable name of a response to a prompt, 16 hexadecimal digits.

    Args:
        prompt: Its messages.
        response: Its text, or its messages where it is more than one text of the assistant.
        tools: What the assistant may call.
    """
    content = [list(prompt), response if isinstance(response, str) else list(response)]
    content += [list(tools)] if tools else []
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def keys_of(comparison: Comparison) -> list[str]:
    """Stable names of the responses of a comparison."""
    turns = comparison.turns or (None,) * len(comparison.responses)
    return [
        response_key(comparison.prompt, text if own is None else own, comparison.tools)
        for text, own in zip(comparison.responses, turns, strict=True)
    ]
