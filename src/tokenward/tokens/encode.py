"""Comparisons to token ids, with every loss counted."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from tokenward.errors import UserError
from tokenward.tokens.template import Template
from tokenward.types import Comparison, Message

TooLong = Literal["drop", "truncate", "error"]


class Limits(NamedTuple):
    """Longest prompt and longest response in tokens, and what becomes of longer ones.

    Attributes:
        max_prompt_tokens: Of the prompt, template included.
        max_response_tokens: Of each response, end-of-turn token included.
        too_long: ``drop`` the comparison, ``truncate`` it, or stop with an ``error``.
        context: Positions that the model has; a comparison that needs more is always dropped.
    """

    max_prompt_tokens: int
    max_response_tokens: int
    too_long: TooLong = "drop"
    context: int | None = None


class Encoded(NamedTuple):
    """A comparison as token ids.

    Attributes:
        comparison: Where it came from.
        prompt: Ids of the prompt.
        responses: Ids of each response; closed with the end-of-turn token unless it was cut.
        closed: Whether each response still has its end.
        closing: How many tokens at the end of a closed response are no text.
    """

    comparison: Comparison
    prompt: list[int]
    responses: list[list[int]]
    closed: list[bool]
    closing: int

    @property
    def length(self) -> int:
        """Tokens of the comparison as one shared row."""
        return len(self.prompt) + sum(map(len, self.responses))


class EncodedSet(NamedTuple):
    """What encoding made of comparisons, and what it counted on the way."""

    rows: Sequence[Encoded]
    counts: dict[str, int]


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


def encode(
    comparisons: Iterable[Comparison], template: Template, limits: Limits, *, may_be_empty: bool = False
) -> EncodedSet:
    """Encode comparisons; what would leave nothing to train on is dropped and counted.

    Raises:
        UserError: a row is too long and ``limits.too_long`` is ``"error"``, or nothing is left and
            that may not be.
    """
    rows: list[Encoded] = []
    counts: Counter[str] = Counter()
    for comparison in comparisons:
        counts["read"] += 1
        row, notes = encode_one(comparison, template, limits)
        counts.update(notes)
        if row is not None:
            rows.append(row)
    counts["kept"] = len(rows)
    if not may_be_empty:
        check_some_left(counts)
    return EncodedSet(rows, dict(counts))


def check_some_left(counts: Mapping[str, int]) -> None:
    """Refuse to go on with nothing, and say why nothing is left.

    Raises:
        UserError: no comparison was kept.
    """
    if counts["kept"]:
        return
    reasons = ", ".join(f"{name}: {count}" for name, count in counts.items() if name not in ("read", "kept"))
    raise UserError(
        f"no comparison is left after encoding {counts['read']} ({reasons or 'there were none'}). "
        "Raise tokens.max_prompt_tokens or tokens.max_response_tokens, or write tokens.too_long: truncate."
    )


def encode_one(
    comparison: Comparison, template: Template, limits: Limits
) -> tuple[Encoded | None, list[str]]:
    """One comparison as ids, or None, with the reasons of what was dropped or changed."""
    (parts,) = encode_parts([comparison], template, limits)
    sizes = Sizes(parts.prompt_length, len(parts.prompt), parts.lengths, any(parts.joins))
    kept, notes = judge(sizes, limits, comparison.source, lambda: _all_same(parts.responses))
    if not kept:
        return None, notes
    closed = [length <= limits.max_response_tokens for length in parts.lengths]
    return Encoded(comparison, parts.prompt, parts.responses, closed, len(template.closing_ids)), notes


def _all_same(responses: Sequence[Sequence[int]]) -> bool:
    return len(responses) > 1 and len(set(map(tuple, responses))) < 2


class Parts(NamedTuple):
    """Prompt and responses as ids, before it is judged what becomes of them.

    Attributes:
        prompt: Within the limit.
        prompt_length: Of the whole prompt.
        responses: Each within the limit.
        lengths: Of the whole responses.
        joins: Whether the prompt and the response as one text would give other ids where they meet.
    """

    prompt: list[int]
    prompt_length: int
    responses: list[list[int]]
    lengths: list[int]
    joins: list[bool]


def encode_parts(comparisons: Sequence[Comparison], template: Template, limits: Limits) -> list[Parts]:
    """Ids of comparisons, which are best some hundreds: the tokenizer takes them at once."""
    rendered = [template.render(comparison.prompt) for comparison in comparisons]
    prompts = template.rendered_ids(rendered)
    owner = [number for number, comparison in enumerate(comparisons) for _ in comparison.responses]
    texts = [text for comparison in comparisons for text in comparison.responses]
    own = template.texts_ids(texts)
    closing = template.closing_ids
    asked = [rendered[number] for number in owner], [prompts[number] for number in owner]
    joins = _joins(*asked, texts, own, template)
    parts, first = [], 0
    for comparison, prompt in zip(comparisons, prompts, strict=True):
        mine = slice(first, first := first + len(comparison.responses))
        whole = [ids + closing for ids in own[mine]]
        kept = _within(comparison.prompt, prompt, template, limits)
        cut = [ids[: limits.max_response_tokens] for ids in whole]
        parts.append(Parts(kept, len(prompt), cut, list(map(len, whole)), joins[mine]))
    return parts


def _within(messages: Sequence[Message], ids: list[int], template: Template, limits: Limits) -> list[int]:
    if len(ids) <= limits.max_prompt_tokens:
        return ids
    # Unless it is to be cut, a comparison with such a prompt is dropped, whatever its ids.
    return (
        _shorten_prompt(messages, template, limits.max_prompt_tokens) if limits.too_long == "truncate" else []
    )


def _joins(
    rendered: Sequence[str],
    prompts: Sequence[list[int]],
    texts: Sequence[str],
    own: Sequence[list[int]],
    template: Template,
) -> list[bool]:
    """As :meth:`Template.joins_differently`, of many responses, each with its prompt."""
    if template.encoder:
        return [False] * len(texts)  # prompt and reply never stand in one text
    joint = template.joint_ids([prompt + text for prompt, text in zip(rendered, texts, strict=True)])
    apart = (prompt + ids for prompt, ids in zip(prompts, own, strict=True))
    return [whole[: len(ids)] != ids for whole, ids in zip(joint, apart, strict=True)]


class Sizes(NamedTuple):
    """What :func:`judge` looks at, in tokens.

    Attributes:
        prompt: Of the whole prompt.
        kept: Of the prompt within the limit.
        responses: Of the whole responses.
        joins: Whether encoding any of them together with the prompt would give other ids.
    """

    prompt: int
    kept: int
    responses: Sequence[int]
    joins: bool


def judge(sizes: Sizes, limits: Limits, source: str, same: Callable[[], bool]) -> tuple[bool, list[str]]:
    """Whether a comparison stays, with the reasons of what was dropped or changed.

    Args:
        sizes: Of the comparison.
        limits: To keep within.
        source: Where the comparison came from.
        same: Whether all of several responses are the same once they are cut; asked only if one is.

    Raises:
        UserError: it is too long and ``limits.too_long`` is ``"error"``.
    """
    longest = max(sizes.responses, default=0)
    if not sizes.prompt:
        return False, ["dropped: empty prompt"]
    refused = _too_long(source, sizes.prompt, longest, limits)
    if refused is not None:
        return False, [refused]
    notes = []
    if sizes.prompt > limits.max_prompt_tokens:
        notes.append("note: prompt truncated")
    if longest > limits.max_response_tokens:
        notes.append("note: response truncated")
        if same():
            return False, ["dropped: responses are the same after truncation"]
    cut = min(longest, limits.max_response_tokens)
    if limits.context is not None and sizes.kept + cut > limits.context:
        return False, ["dropped: longer than the model's context"]
    if sizes.joins:
        notes.append("note: joint encoding differs at the boundary")
    return True, notes


def _too_long(source: str, prompt: int, longest: int, limits: Limits) -> str | None:
    """Reason to drop a comparison whose parts exceed the limits; None if it stays, whole or to be cut."""
    over_prompt, over_response = prompt > limits.max_prompt_tokens, longest > limits.max_response_tokens
    if not (over_prompt or over_response) or limits.too_long == "truncate":
        return None
    if limits.too_long == "drop":
        return "dropped: prompt too long" if over_prompt else "dropped: response too long"
    raise UserError(
        f"{source}: the prompt has {prompt} tokens and the longest response {longest}; allowed are "
        f"{limits.max_prompt_tokens} and {limits.max_response_tokens}. Raise tokens.max_prompt_tokens or "
        "tokens.max_response_tokens, or write tokens.too_long: drop or truncate."
    )


def _shorten_prompt(messages: Sequence[Message], template: Template, limit: int) -> list[int]:
    """Drop the oldest turns (never a system message, never the last turn), then tokens from the left."""
    head = [message for message in messages[:1] if message["role"] == "system"]
    turns = list(messages[len(head) :])
    ids = template.prompt_ids([*head, *turns])
    while len(ids) > limit and len(turns) > 1:
        # Templates want a user's turn first: what answered the dropped turn goes with it.
        turns = turns[1:]
        while len(turns) > 1 and turns[0]["role"] != "user":
            turns = turns[1:]
        ids = template.prompt_ids([*head, *turns])
    return ids[-limit:]
