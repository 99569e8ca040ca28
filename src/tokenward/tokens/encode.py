"""Comparisons to token ids, with every loss counted."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

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
    """What encoding made of a list of comparisons, and what it counted on the way."""

    rows: list[Encoded]
    counts: dict[str, int]


def response_key(prompt: Sequence[Message], response: str) -> str:
    """Stable name of a response to a prompt, 16 hexadecimal digits."""
    text = json.dumps([list(prompt), response], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
    if not rows and not may_be_empty:
        reasons = ", ".join(
            f"{name}: {count}" for name, count in counts.items() if name not in ("read", "kept")
        )
        raise UserError(
            f"no comparison is left after encoding {counts['read']} ({reasons or 'there were none'}). "
            "Raise tokens.max_prompt_tokens or tokens.max_response_tokens, or write tokens.too_long: truncate."
        )
    return EncodedSet(rows, dict(counts))


def encode_one(
    comparison: Comparison, template: Template, limits: Limits
) -> tuple[Encoded | None, list[str]]:
    """One comparison as ids, or None, with the reasons of what was dropped or changed."""
    prompt = template.prompt_ids(comparison.prompt)
    responses = [template.response_ids(text) for text in comparison.responses]
    longest = max(map(len, responses), default=0)
    if not prompt:
        return None, ["dropped: empty prompt"]
    refused = _too_long(comparison, len(prompt), longest, limits)
    if refused is not None:
        return None, [refused]
    notes = []
    if len(prompt) > limits.max_prompt_tokens:
        prompt = _shorten_prompt(comparison.prompt, template, limits.max_prompt_tokens)
        notes.append("note: prompt truncated")
    cut = [ids[: limits.max_response_tokens] for ids in responses]
    if longest > limits.max_response_tokens:
        notes.append("note: response truncated")
        if len(cut) > 1 and len({tuple(ids) for ids in cut}) < 2:
            return None, ["dropped: responses are the same after truncation"]
    if limits.context is not None and len(prompt) + max(map(len, cut), default=0) > limits.context:
        return None, ["dropped: longer than the model's context"]
    if any(template.joins_differently(comparison.prompt, text) for text in comparison.responses):
        notes.append("note: joint encoding differs at the boundary")
    closed = [len(ids) <= limits.max_response_tokens for ids in responses]
    return Encoded(comparison, prompt, cut, closed, len(template.closing_ids)), notes


def _too_long(comparison: Comparison, prompt: int, longest: int, limits: Limits) -> str | None:
    """Reason to drop a comparison whose parts exceed the limits; None if it stays, whole or to be cut."""
    over_prompt, over_response = prompt > limits.max_prompt_tokens, longest > limits.max_response_tokens
    if not (over_prompt or over_response) or limits.too_long == "truncate":
        return None
    if limits.too_long == "drop":
        return "dropped: prompt too long" if over_prompt else "dropped: response too long"
    raise UserError(
        f"{comparison.source}: the prompt has {prompt} tokens and the longest response {longest}; allowed are "
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
