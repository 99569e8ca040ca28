"""One function per shape of row: what it says, as prompt, responses, ranks, scores and spans."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokenward.data.conversations import (
    DataReply,
    Sides,
    from_pair,
    from_shared_beginning,
    from_transcripts,
    prompt_of,
    reply,
    shared_prompt,
    sides_of,
    user,
)
from tokenward.data.fields import (
    FieldError,
    Row,
    Unusable,
    describe,
    integer,
    items,
    number,
    objects,
    optional,
    parsed,
    required,
    text,
)
from tokenward.data.messages import Conversation, messages, text_or_messages, tools_of
from tokenward.types import Message, Span

PAIR_SCORES = ("score_chosen", "score_rejected")


class Parsed(NamedTuple):
    """One row as read, before it is checked for being of use. Ranks are dense: 0 is the best.

    A row of one response says by its rank whether that is good (0) or bad (1), and is ``alone``.
    """

    prompt: Conversation
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    scores: tuple[float, ...] | None = None
    spans: tuple[tuple[Span, ...], ...] | None = None
    turns: tuple[Conversation | None, ...] | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    alone: bool = False


def parsed_replies(
    prompt: Conversation, replies: Sequence[DataReply], ranks: Sequence[int], **more: Any
) -> Parsed:
    """A row of a prompt and its replies."""
    turns = tuple(each.turns for each in replies)
    return Parsed(
        prompt,
        tuple(each.text for each in replies),
        tuple(ranks),
        turns=None if all(own is None for own in turns) else turns,
        **more,
    )


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
    return parsed_replies(sides.prompt, (sides.chosen, sides.rejected), (0, 1), scores=scores)


def parse_pairs(row: Row) -> Parsed:
    """TRL's prompt, chosen and rejected, as text or messages, with scores where the row has them.

    Where a side is a list of texts, or of lists of messages, each of them is a reply: those of one side are tied.
    """
    if any(_several(row.get(side)) for side in ("chosen", "rejected")):
        return _sides_of_several(row)
    return _pair(from_pair(row), row)


def _several(value: object) -> bool:
    """Whether this is a list of replies, each a text or a list of messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], str | list)


def _sides_of_several(row: Row) -> Parsed:
    for field in PAIR_SCORES:
        if optional(row, field) is not None:
            raise FieldError(
                field, "is one score of several replies. Write responses and scores, a score for each"
            )
    prompt = prompt_of(row)
    replies: list[DataReply] = []
    ranks: list[int] = []
    for rank, side in enumerate(("chosen", "rejected")):
        value = required(row, side)
        each = value if _several(value) else [value]
        replies += [reply(text_or_messages(one, f"{side}[{i}]"), prompt) for i, one in enumerate(each)]
        ranks += [rank] * len(each)
    return parsed_replies(prompt, replies, ranks)


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
    replies = [reply(text_or_messages(r, f"responses[{i}]"), prompt) for i, r in enumerate(given)]
    responses = tuple(each.text for each in replies)
    scores = None
    if optional(row, "scores") is not None:
        values = _per_response(row, "scores", len(responses))
        scores = tuple(number(value, f"scores[{i}]") for i, value in enumerate(values))
    if optional(row, "ranks") is not None or scores is None:
        values = _per_response(row, "ranks", len(responses))
        ranks = dense([integer(value, f"ranks[{i}]") for i, value in enumerate(values)])
    else:
        ranks = dense([-score for score in scores])
    return parsed_replies(prompt, replies, ranks, scores=scores, spans=_spans(row, responses))


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


def parse_alpaca(row: Row) -> Parsed:
    """Alpaca: the prompt is the instruction, and below it the input where there is one."""
    parts = [text(required(row, "instruction"), "instruction")]
    if optional(row, "input") is not None:
        parts.append(text(row["input"], "input"))
    return parse_pairs({**row, "prompt": "\n".join(part for part in parts if part)})


def parse_sharegpt(row: Row) -> Parsed:
    """ShareGPT: a conversation so far, and two ways in which it goes on."""
    prompt = messages(required(row, "conversations"), "conversations")
    chosen, rejected = (_conversation(row, side) for side in ("chosen", "rejected"))
    return _pair(sides_of(prompt, chosen, rejected), row)


def parse_swift(row: Row) -> Parsed:
    """ms-swift: a conversation whose last reply is the chosen one, and what is rejected in its place."""
    talk = messages(required(row, "messages"), "messages")
    if optional(row, "rejected_messages") is not None:
        rejected = messages(row["rejected_messages"], "rejected_messages")
        prompt = shared_prompt(talk, rejected)
        return parsed_replies(prompt, (reply(talk, prompt), reply(rejected, prompt)), (0, 1))
    prompt, chosen = talk[:-1], reply(talk[-1:], ())
    given = required(row, "rejected_response")
    others = given if _several(given) else [given]
    replies = [reply(text_or_messages(one, "rejected_response"), prompt) for one in others]
    return parsed_replies(prompt, (chosen, *replies), (0,) + (1,) * len(replies))


def parse_openai(row: Row) -> Parsed:
    """OpenAI's rows for preference training: ``input.messages``, ``preferred_output``, ``non_preferred_output``."""
    given = required(row, "input")
    if not isinstance(given, Mapping):
        raise FieldError("input", f"found {describe(given)}, expected an object with messages")
    prompt = messages(required(given, "messages", path="input."), "input.messages")
    chosen, rejected = (_conversation(row, f"{side}_output") for side in ("preferred", "non_preferred"))
    sides = sides_of(prompt, chosen, rejected)
    return parsed_replies(
        sides.prompt, (sides.chosen, sides.rejected), (0, 1), tools=tools_of(given, "tools")
    )


def parse_safe_rlhf(row: Row) -> Parsed:
    """PKU-SafeRLHF: two responses and the number of the better one; which is the safer one is not read."""
    responses = [text(required(row, field), field) for field in ("response_0", "response_1")]
    better = integer(required(row, "better_response_id"), "better_response_id")
    if better not in (0, 1):
        raise FieldError("better_response_id", f"found the number {better}, expected 0 or 1")
    return Parsed(prompt_of(row), tuple(responses), (better, 1 - better))


def parse_shp(row: Row) -> Parsed:
    """Stanford Human Preferences: two answers to a post, ``labels`` 1 where A is the better one, 0 where B is."""
    prompt = user(text(required(row, "history"), "history"))
    responses = [text(required(row, field), field) for field in ("human_ref_A", "human_ref_B")]
    label = integer(required(row, "labels"), "labels")
    if label not in (0, 1):
        raise FieldError("labels", f"found the number {label}, expected 1 (A is better) or 0 (B is)")
    scores = None
    if any(optional(row, field) is not None for field in ("score_A", "score_B")):
        scores = tuple(number(required(row, field), field) for field in ("score_A", "score_B"))
    return Parsed(prompt, tuple(responses), (1 - label, label), scores)


def parse_unpaired(row: Row) -> Parsed:
    """TRL's unpaired rows: a completion that is good or bad by itself."""
    prompt = prompt_of(row)
    answer = reply(text_or_messages(required(row, "completion"), "completion"), prompt)
    label = parsed(required(row, "label"))
    if isinstance(label, str) and label.lower() in ("true", "false"):  # as tables write it
        label = label.lower() == "true"
    if label not in (True, False):
        raise FieldError("label", f"found {describe(label)}, expected true (good) or false (bad)")
    return parsed_replies(prompt, (answer,), (int(not label),), alone=True)


def with_row_wide(found: Parsed, row: Row) -> Parsed:
    """A row with what its columns ``system`` and ``tools`` say, which may stand beside any shape.

    Raises:
        FieldError: A column is not what it should be, or the prompt has another system message already.
    """
    if optional(row, "tools") is not None:
        found = found._replace(tools=tools_of(row))
    given = optional(row, "system")
    if given is None or not text(given, "system").strip():
        return found
    first = Message(role="system", content=text(given, "system"))
    if found.prompt and found.prompt[0]["role"] == "system":
        if found.prompt[0] != first:
            raise FieldError("system", "the prompt begins with another system message. Leave one of them out")
        return found
    return found._replace(prompt=(first, *found.prompt))


class PromptAndTools(NamedTuple):
    """A prompt, and what the assistant may call."""

    prompt: Conversation
    tools: tuple[Mapping[str, Any], ...]


def asked_of(row: Row) -> PromptAndTools:
    """``prompt``, and ``system`` and ``tools`` where they are, read as in training.

    Raises:
        FieldError: One is missing or not what it should be.
    """
    found = with_row_wide(Parsed(prompt_of(row), (), ()), row)
    return PromptAndTools(found.prompt, found.tools)


class Answered(NamedTuple):
    """A prompt and one response to it, as a row of people's own has them."""

    prompt: Conversation
    response: DataReply
    tools: tuple[Mapping[str, Any], ...]


def answered(row: Row) -> Answered:
    """``prompt`` and ``response``, and ``system`` and ``tools`` where they are, read as in training.

    Raises:
        FieldError: One is missing or not what it should be, or the response is no reply.
    """
    prompt = prompt_of(row)
    try:
        response = reply(text_or_messages(required(row, "response"), "response"), prompt)
    except Unusable as reason:
        raise FieldError("response", str(reason)) from reason
    return Answered(asked_of(row).prompt, response, tools_of(row))


def _conversation(row: Row, field: str) -> Conversation:
    """A side that is text, one message or several."""
    value = text_or_messages(required(row, field), field)
    return (Message(role="assistant", content=value),) if isinstance(value, str) else value
