"""One function per shape of row: what it says, as prompt, responses, ranks, scores and spans."""

from collections.abc import Sequence
from typing import NamedTuple

from tokenward.data.conversations import (
    Conversation,
    Sides,
    from_pair,
    from_shared_beginning,
    from_transcripts,
    prompt_of,
    reply,
    user,
)
from tokenward.data.fields import (
    FieldError,
    Row,
    integer,
    items,
    number,
    objects,
    optional,
    required,
    text,
    text_or_messages,
)
from tokenward.types import Span

PAIR_SCORES = ("score_chosen", "score_rejected")


class Parsed(NamedTuple):
    """One row as read, before it is checked for being of use. Ranks are dense: 0 is the best."""

    prompt: Conversation
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    scores: tuple[float, ...] | None = None
    spans: tuple[tuple[Span, ...], ...] | None = None


def dense(ranks: Sequence[float]) -> tuple[int, ...]:
    """The same order as ranks 0, 1, 2, ... without gaps; equal values stay equal."""
    order = {value: place for place, value in enumerate(sorted(set(ranks)))}
    return tuple(order[value] for value in ranks)


def _pair(sides: Sides, row: Row) -> Parsed:
    """The scores of a pair are optional, but one without the other is a mistake."""
    scores = None
    if any(optional(row, field) is not None for field in PAIR_SCORES):
        first, second = (number(required(row, field), field) for field in PAIR_SCORES)
        scores = (first, second)
    return Parsed(sides.prompt, (sides.chosen, sides.rejected), (0, 1), scores)


def parse_pairs(row: Row) -> Parsed:
    """TRL's prompt, chosen and rejected, as text or messages, with scores where the row has them."""
    return _pair(from_pair(row), row)


def parse_scored_pairs(row: Row) -> Parsed:
    """HuggingFaceH4/ultrafeedback_binarized: a pair of whole conversations with their scores."""
    for field in PAIR_SCORES:
        required(row, field)
    return parse_pairs(row)


def parse_hh(row: Row) -> Parsed:
    """Anthropic HH: chosen and rejected as transcripts."""
    return _pair(from_transcripts(row), row)


def parse_implicit(row: Row) -> Parsed:
    """Chosen and rejected that begin with their prompt."""
    return _pair(from_shared_beginning(row), row)


def parse_ranked(row: Row) -> Parsed:
    """Any number of responses with ranks (lower is better), or scores (higher is better), and spans."""
    prompt = prompt_of(row)
    given = items(required(row, "responses"), "responses")
    responses = tuple(reply(text_or_messages(r, f"responses[{i}]"), prompt) for i, r in enumerate(given))
    scores = None
    if optional(row, "scores") is not None:
        values = _per_response(row, "scores", len(responses))
        scores = tuple(number(value, f"scores[{i}]") for i, value in enumerate(values))
    if optional(row, "ranks") is not None or scores is None:
        values = _per_response(row, "ranks", len(responses))
        ranks = dense([integer(value, f"ranks[{i}]") for i, value in enumerate(values)])
    else:
        ranks = dense([-score for score in scores])
    return Parsed(prompt, responses, ranks, scores, _spans(row, responses))


def _per_response(row: Row, field: str, count: int) -> Sequence[object]:
    values = items(required(row, field), field)
    if len(values) != count:
        raise FieldError(field, f"found {len(values)} for {count} responses")
    return values


def _spans(row: Row, responses: Sequence[str]) -> tuple[tuple[Span, ...], ...] | None:
    if optional(row, "spans") is None:
        return None
    lists = _per_response(row, "spans", len(responses))
    return tuple(
        tuple(
            span_of(span, f"spans[{i}][{j}]", responses[i])
            for j, span in enumerate(items(given, f"spans[{i}]"))
        )
        for i, given in enumerate(lists)
    )


def span_of(value: object, field: str, response: str) -> Span:
    """A span of a response, written ``[start, end, value]``.

    Raises:
        FieldError: It is something else, or does not lie in the response.
    """
    parts = items(value, field)
    if len(parts) != 3:
        raise FieldError(field, f"found a list of {len(parts)}, expected [start, end, value]")
    span = Span(integer(parts[0], field), integer(parts[1], field), number(parts[2], field))
    if not 0 <= span.start < span.end <= len(response):
        found = f"found characters {span.start} to {span.end}"
        raise FieldError(
            field, f"{found}, expected 0 <= start < end <= {len(response)}, the response's length"
        )
    return span


def parse_ultrafeedback(row: Row) -> Parsed:
    """UltraFeedback: completions with scores.

    Overall scores only where every completion has one: fine-grained ones are on another scale.
    """
    prompt = text(required(row, "instruction"), "instruction")
    replies = objects(required(row, "completions"), "completions")
    overall = all(optional(entry, "overall_score") is not None for entry in replies)
    name = "overall_score" if overall else "fine-grained_score"
    paths = [f"completions[{i}]." for i in range(len(replies))]
    responses = _each(replies, paths, "response")
    scores = tuple(number(required(e, name, path=p), p + name) for e, p in zip(replies, paths, strict=True))
    return Parsed(user(prompt), responses, dense([-score for score in scores]), scores)


def parse_nectar(row: Row) -> Parsed:
    """Nectar: answers with ranks from 1, the best."""
    prompt = prompt_of(row)
    replies = objects(required(row, "answers"), "answers")
    paths = [f"answers[{i}]." for i in range(len(replies))]
    ranks = [integer(required(e, "rank", path=p), p + "rank") for e, p in zip(replies, paths, strict=True)]
    return Parsed(prompt, _each(replies, paths, "answer"), dense(ranks))


def _each(entries: Sequence[Row], paths: Sequence[str], name: str) -> tuple[str, ...]:
    pairs = zip(entries, paths, strict=True)
    return tuple(text(required(entry, name, path=path), path + name) for entry, path in pairs)
