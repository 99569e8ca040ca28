"""One function per row format. Each reads a row into prompt, responses, ranks, scores and spans.

A malformed field raises a FieldError, and a row without two comparable replies raises Unusable with the reason.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokenward.data.conversations import (
    SIDES,
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
    boolean,
    describe,
    integer,
    items,
    number,
    objects,
    optional,
    parsed,
    read,
    required,
    text,
)
from tokenward.data.messages import Conversation, messages, text_or_messages, tools_of
from tokenward.types import Message, Span

PAIR_SCORES = ("score_chosen", "score_rejected")


class Parsed(NamedTuple):
    """A row before it is checked for usefulness. Ranks are dense, and 0 is the best.

    With ``alone`` the row has one response, whose rank is 0 (good) or 1 (bad).
    """

    prompt: Conversation
    responses: tuple[str, ...]
    ranks: tuple[int, ...]
    scores: tuple[float, ...] | None = None
    spans: tuple[tuple[Span, ...], ...] | None = None
    turns: tuple[Conversation | None, ...] | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    alone: bool = False


def dense(ranks: Sequence[float]) -> tuple[int, ...]:
    """The same order as ranks 0, 1, 2, ... without gaps. Equal values stay equal."""
    order = {value: place for place, value in enumerate(sorted(set(ranks)))}
    return tuple(order[value] for value in ranks)


def parse_pairs(row: Row) -> Parsed:
    """TRL's prompt, chosen and rejected, as text or messages, with optional scores.

    A side may be a list of texts or of lists of messages: each item is a reply, and replies of a side are tied.
    """
    if not any(_is_several(row.get(side)) for side in SIDES):
        return _pair(from_pair(row), row)
    for field in PAIR_SCORES:
        if optional(row, field) is not None:
            raise FieldError(field, "is one score for several replies. Give responses, with a list of scores")
    prompt = prompt_of(row)
    replies: list[DataReply] = []
    ranks: list[int] = []
    for rank, side in enumerate(SIDES):
        value = required(row, side)
        found = _replies(value if _is_several(value) else [value], side, prompt)
        replies += found
        ranks += [rank] * len(found)
    return _parsed_replies(prompt, replies, ranks)


def parse_scored_pairs(row: Row) -> Parsed:
    """HuggingFaceH4/ultrafeedback_binarized: a pair of whole conversations with their scores."""
    for field in PAIR_SCORES:
        required(row, field)
    return parse_pairs(row)


def parse_hh(row: Row) -> Parsed:
    """Anthropic HH: chosen and rejected as transcripts."""
    return _pair(from_transcripts(row), row)


def parse_implicit(row: Row) -> Parsed:
    """Chosen and rejected that both start with the prompt."""
    return _pair(from_shared_beginning(row), row)


def parse_ranked(row: Row) -> Parsed:
    """Any number of responses with ranks (lower is better) or scores (higher is better), and optional spans."""
    prompt = prompt_of(row)
    replies = _replies(read(row, "responses", items), "responses", prompt)
    scores = None
    if optional(row, "scores") is not None:
        values = _per_response(row, "scores", len(replies))
        scores = tuple(number(value, f"scores[{i}]") for i, value in enumerate(values))
    if optional(row, "ranks") is not None or scores is None:
        values = _per_response(row, "ranks", len(replies))
        ranks = dense([integer(value, f"ranks[{i}]") for i, value in enumerate(values)])
    else:
        ranks = dense([-score for score in scores])
    spans = None
    if optional(row, "spans") is not None:
        given = _per_response(row, "spans", len(replies))
        spans = tuple(spans_of(given[i], f"spans[{i}]", answer.text) for i, answer in enumerate(replies))
    return _parsed_replies(prompt, replies, ranks, scores=scores, spans=spans)


def spans_of(given: object, field: str, response: str) -> tuple[Span, ...]:
    """The spans of a response, in one of three forms.

    ``[start, end, value]`` each; or axolotl's ``train_detail``, ``{begin_offset, end_offset, train}``, whose end is the last
    character and not the one after it; or axolotl's segments, ``{label, text}``, which spell the response. In the last two, a
    ``weight`` may be given; without it the value is 1 for what is trained on, and 0 for the rest.
    """
    entries = items(given, field)
    if entries and isinstance(entries[0], Mapping) and "text" in entries[0]:
        return _segments(objects(entries, field), field, response)
    return tuple(span_of(span, f"{field}[{j}]", response) for j, span in enumerate(entries))


def _segments(entries: Sequence[Row], field: str, response: str) -> tuple[Span, ...]:
    found, start = list[Span](), 0
    for index, entry in enumerate(entries):
        own = f"{field}[{index}]."
        end = start + len(read(entry, "text", text, path=own))
        if response[start:end] != entry["text"]:
            there = f"characters {start} to {end} of the response are others"
            raise FieldError(f"{own}text", f"{there}, expected segments whose texts give the response")
        if end > start:
            found.append(Span(start, end, _weight(entry, "label", own)))
        start = end
    if start != len(response):
        raise FieldError(field, f"found segments of {start} characters for a response of {len(response)}")
    return tuple(found)


def _weight(entry: Row, name: str, path: str) -> float:
    """The value of what is trained on or not, with an optional weight."""
    trained = read(entry, name, boolean, path=path)
    weight = 1.0 if optional(entry, "weight") is None else number(entry["weight"], f"{path}weight")
    return weight if trained else 0.0


def span_of(value: object, field: str, response: str) -> Span:
    """A span of a response, written ``[start, end, value]`` or as axolotl's ``train_detail``."""
    if isinstance(value, Mapping):
        ends = [read(value, name, integer, path=f"{field}.") for name in ("begin_offset", "end_offset")]
        value = [ends[0], ends[1] + 1, _weight(value, "train", f"{field}.")]
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

    Overall scores are used only if every completion has one, because fine-grained scores are on another scale.
    """
    prompt = user(read(row, "instruction", text))
    completions = read(row, "completions", objects)
    overall = all(optional(entry, "overall_score") is not None for entry in completions)
    responses = _each(completions, "completions", "response", text)
    scores = _each(completions, "completions", "overall_score" if overall else "fine-grained_score", number)
    return Parsed(prompt, responses, dense([-score for score in scores]), scores)


def parse_nectar(row: Row) -> Parsed:
    """Nectar: answers with ranks, of which 1 is the best."""
    answers = read(row, "answers", objects)
    ranks = dense(_each(answers, "answers", "rank", integer))
    return Parsed(prompt_of(row), _each(answers, "answers", "answer", text), ranks)


def parse_alpaca(row: Row) -> Parsed:
    """Alpaca: the prompt is the instruction, followed by the input if there is one."""
    parts = [read(row, "instruction", text)]
    if optional(row, "input") is not None:
        parts.append(text(row["input"], "input"))
    return parse_pairs({**row, "prompt": "\n".join(part for part in parts if part)})


def parse_sharegpt(row: Row) -> Parsed:
    """ShareGPT: a conversation and two ways to continue it."""
    prompt = read(row, "conversations", messages)
    return _pair(sides_of(prompt, *(read(row, side, _conversation) for side in SIDES)), row)


def parse_swift(row: Row) -> Parsed:
    """ms-swift: a conversation whose last reply is the chosen one, and the rejected alternative."""
    talk = read(row, "messages", messages)
    if optional(row, "rejected_messages") is not None:
        rejected = messages(row["rejected_messages"], "rejected_messages")
        prompt = shared_prompt(talk, rejected)
        return _parsed_replies(prompt, (reply(talk, prompt), reply(rejected, prompt)), (0, 1))
    prompt, chosen = talk[:-1], reply(talk[-1:], ())
    value = required(row, "rejected_response")
    others = _replies(value if _is_several(value) else [value], "rejected_response", prompt)
    return _parsed_replies(prompt, (chosen, *others), (0,) + (1,) * len(others))


def parse_openai(row: Row) -> Parsed:
    """OpenAI's preference format: ``input.messages``, ``preferred_output`` and ``non_preferred_output``."""
    given = required(row, "input")
    if not isinstance(given, Mapping):
        raise FieldError("input", f"found {describe(given)}, expected an object with messages")
    prompt = read(given, "messages", messages, path="input.")
    outputs = (read(row, f"{side}_output", _conversation) for side in ("preferred", "non_preferred"))
    sides = sides_of(prompt, *outputs)
    return _parsed_replies(sides.prompt, sides[1:], (0, 1), tools=tools_of(given))


def parse_safe_rlhf(row: Row) -> Parsed:
    """PKU-SafeRLHF: two responses and the number of the better one. The number of the safer one is not read."""
    responses = [read(row, field, text) for field in ("response_0", "response_1")]
    better = read(row, "better_response_id", integer)
    if better not in (0, 1):
        raise FieldError("better_response_id", f"found the number {better}, expected 0 or 1")
    return Parsed(prompt_of(row), tuple(responses), (better, 1 - better))


def parse_shp(row: Row) -> Parsed:
    """Stanford Human Preferences: two answers to a post; ``labels`` is 1 if A is better and 0 if B is better."""
    prompt = user(read(row, "history", text))
    responses = tuple(read(row, field, text) for field in ("human_ref_A", "human_ref_B"))
    label = read(row, "labels", integer)
    if label not in (0, 1):
        raise FieldError("labels", f"found the number {label}, expected 1 (A is better) or 0 (B is better)")
    return Parsed(prompt, responses, (1 - label, label), _both_scores(row, ("score_A", "score_B")))


def parse_unpaired(row: Row) -> Parsed:
    """TRL's unpaired format: a completion that is labelled good or bad."""
    prompt = prompt_of(row)
    answer = reply(read(row, "completion", text_or_messages), prompt)
    label = parsed(required(row, "label"))
    if isinstance(label, str) and label.lower() in ("true", "false"):  # as CSV files spell it
        label = label.lower() == "true"
    if label not in (True, False):
        raise FieldError("label", f"found {describe(label)}, expected true (good) or false (bad)")
    return _parsed_replies(prompt, (answer,), (int(not label),), alone=True)


def with_row_wide(found: Parsed, row: Row) -> Parsed:
    """Adds the columns ``system`` and ``tools``, which every format may have."""
    if optional(row, "tools") is not None:
        found = found._replace(tools=tools_of(row))
    given = optional(row, "system")
    if given is None or not text(given, "system").strip():
        return found
    first = Message(role="system", content=text(given, "system"))
    if found.prompt and found.prompt[0]["role"] == "system":
        if found.prompt[0] != first:
            raise FieldError("system", "the prompt begins with another system message. Remove one of them")
        return found
    return found._replace(prompt=(first, *found.prompt))


class PromptAndTools(NamedTuple):
    """A prompt, and the tools that the assistant may call."""

    prompt: Conversation
    tools: tuple[Mapping[str, Any], ...]


def asked_of(row: Row) -> PromptAndTools:
    """``prompt``, and the optional ``system`` and ``tools``, read as for training."""
    found = with_row_wide(Parsed(prompt_of(row), (), ()), row)
    return PromptAndTools(found.prompt, found.tools)


class Answered(NamedTuple):
    """A prompt with one response."""

    prompt: Conversation
    response: DataReply
    tools: tuple[Mapping[str, Any], ...]


def answered(row: Row) -> Answered:
    """``prompt`` and ``response``, and the optional ``system`` and ``tools``, read as for training."""
    prompt = prompt_of(row)
    try:
        response = reply(read(row, "response", text_or_messages), prompt)
    except Unusable as reason:
        raise FieldError("response", str(reason)) from reason
    return Answered(asked_of(row).prompt, response, tools_of(row))


def _parsed_replies(
    prompt: Conversation, replies: Sequence[DataReply], ranks: Sequence[int], **more: Any
) -> Parsed:
    turns = tuple(answer.turns for answer in replies)
    known = None if all(own is None for own in turns) else turns
    return Parsed(prompt, tuple(answer.text for answer in replies), tuple(ranks), turns=known, **more)


def _pair(sides: Sides, row: Row) -> Parsed:
    return _parsed_replies(sides.prompt, sides[1:], (0, 1), scores=_both_scores(row, PAIR_SCORES))


def _both_scores(row: Row, fields: Sequence[str]) -> tuple[float, ...] | None:
    """The scores of a pair are optional, but one without the other is an error."""
    if all(optional(row, field) is None for field in fields):
        return None
    return tuple(read(row, field, number) for field in fields)


def _is_several(value: object) -> bool:
    """Whether this is a list of replies, each a text or a list of messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], str | list)


def _replies(values: Sequence[object], field: str, prompt: Conversation) -> list[DataReply]:
    return [reply(text_or_messages(value, f"{field}[{i}]"), prompt) for i, value in enumerate(values)]


def _conversation(value: object, field: str) -> Conversation:
    """A side that is text, one message or several messages."""
    found = text_or_messages(value, field)
    return (Message(role="assistant", content=found),) if isinstance(found, str) else found


def _per_response(row: Row, field: str, count: int) -> Sequence[object]:
    values = read(row, field, items)
    if len(values) != count:
        raise FieldError(field, f"found {len(values)} for {count} responses")
    return values


def _each(entries: Sequence[Row], field: str, name: str, convert: Any) -> tuple[Any, ...]:
    """The field ``name`` of each entry of a list."""
    return tuple(read(entry, name, convert, path=f"{field}[{i}].") for i, entry in enumerate(entries))
