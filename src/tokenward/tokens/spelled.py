"""The text that a response's tokens spell, and where each of the assistant's own is in it."""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from tokenward.errors import UserError
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.spans import ByteSpan, spans_of_whole, token_spans
from tokenward.types import Span


class Spelled(NamedTuple):
    """A response as text.

    Attributes:
        text: The data's own where the response is one message whose tokens are those of its text alone; otherwise all
            that stands between the prompt and the end of turn, what the template writes and the messages of others
            included.
        spans: Bytes in it of each token that the assistant writes; empty for those that close the response.
        own: Whether the text is the data's.
    """

    text: str
    spans: list[ByteSpan]
    own: bool


def spelled(tokenizer: PreTrainedTokenizerBase, row: TokenRow, place: int) -> Spelled:
    """The text of a response, given its place in its comparison."""
    comparison, ids = row.comparison, row.responses[place]
    count = len(ids) - row.eos[place]
    alone = comparison.turns is None or comparison.turns[place] is None
    if alone and not row.inserts(place):
        text = comparison.responses[place]
        encoding = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        own = list(encoding["input_ids"])
        if own[:count] == ids[:count]:
            # White space that a template cuts off is none of the response's tokens.
            count = len(ids) if own[: len(ids)] == ids else count
            end = ByteSpan(len(text.encode()), len(text.encode()))
            return Spelled(text, [*token_spans(tokenizer, text, count), *[end] * (len(ids) - count)], True)
    whole, places = row.whole(place)
    eos = len(ids) - count
    text, spans = spans_of_whole(tokenizer, whole[: len(whole) - eos])
    end = ByteSpan(len(text.encode()), len(text.encode()))
    return Spelled(text, [*(spans[at] for at in places[:count]), *[end] * eos], False)


def place_in(response: str, text: str) -> int | None:
    """Characters by which a response's text is shifted in a text that holds it, or None; white space may be cut off it."""
    core = response.strip()
    place = text.rfind(
        core
    )  # a reply's text is the last; before it may stand a thought that holds the same words
    return None if place < 0 or not core else place - (len(response) - len(response.lstrip()))


def moved(spans: Sequence[Span], response: str, text: str, source: str) -> list[Span]:
    """Character spans of a response's text as spans of a longer text that holds it.

    Raises:
        UserError: it does not hold it.
    """
    shift = place_in(response, text) if spans else 0
    if shift is None:
        raise UserError(
            f"{source}: the spans of a response cannot be placed, since its template does not write its text as it is. Take the spans out."
        )
    return [
        Span(max(span.start + shift, 0), min(span.end + shift, len(text)), span.value)
        for span in spans
        if span.end + shift > 0 and span.start + shift < len(text)
    ]
