"""Comparisons to token ids. Everything that is lost is counted."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import Any, Literal, NamedTuple

from tokenward.errors import UserError
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.split import DROPPED, SAID, Note, Response, UncutRow, marks_in, split_all
from tokenward.tokens.template import Template
from tokenward.tokens.writing import (
    left_out_of_prompt,
    left_out_of_reply,
    texts_of,
    write_prompt,
    write_reply,
)
from tokenward.types import Comparison, Message

PLACE = "{prompt}"
"""Stands in an auxiliary model's prompt for the last user turn."""


def prompted(row: TokenRow, template: Template, text: str | None, context: int | None) -> TokenRow:
    """A row whose prompt is an auxiliary model's; the response's ids stay, so that values belong to the same tokens.

    Args:
        row: As the policy reads it.
        template: Of the model.
        text: The auxiliary model's prompt, in which ``{prompt}`` stands for the last user turn; None changes nothing.
        context: Positions that the model has, or None.

    Raises:
        UserError: the row has no user turn, or is too long with the new prompt.
    """
    if text is None:
        return row
    messages = with_prompt(row.comparison.prompt, text, row.comparison.source)
    ids = asked_ids(messages, row.comparison.tools, template, row.opening)
    longest = len(ids) + max(map(row.size, range(len(row.responses))))
    if context is not None and longest > context:
        raise UserError(
            f"{row.comparison.source} has {longest} tokens with the auxiliary model's prompt, and the model reads {context}. Shorten the "
            "prompt, or lower tokens.max_prompt_tokens or tokens.max_response_tokens."
        )
    return replace(row, prompt=ids)


def with_prompt(messages: tuple[Message, ...], text: str, source: str) -> tuple[Message, ...]:
    """A conversation whose last user turn is put into a text."""
    places = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if not places:
        raise UserError(
            f"{source} has no user turn into whose place an auxiliary model's prompt could go. Leave prompt out."
        )
    last = places[-1]
    changed = Message(role="user", content=text.replace(PLACE, messages[last]["content"]))
    return (*messages[:last], changed, *messages[last + 1 :])


_SHOWN = 40
_CLOCK = (
    "  the chat template writes the time in a form that it computes, so rows that are written another day differ. Give the date by "
    "tokens.chat_template_kwargs, where the template reads one"
)


def explanations(
    template: Template, examples: Mapping[Note, Comparison], counts: Mapping[str, int]
) -> list[str]:
    """A line for each note.

    Args:
        template: That wrote the rows.
        examples: Per note a comparison that has it.
        counts: How many have each, by the note's words in :data:`tokenward.tokens.split.SAID`.
    """
    lines = [] if template.ending.special else [_ending(template)]
    lines += [_CLOCK] if template.writes_clock else []
    for note, example in examples.items():
        count = counts[SAID[note]]
        lines.append(
            f"  {count} {'row' if count == 1 else 'rows'}, such as {example.source}: {_said(template, note, example)}"
        )
    return lines


def notes_of(template: Template, comparison: Comparison) -> int:
    """All notes of a comparison, bits of :class:`tokenward.tokens.split.Note`."""
    (split,) = split_all([comparison], template)
    return reduce(or_, (own.notes for own in split.responses), split.notes)


def _ending(template: Template) -> str:
    return (
        f"  the template ends a reply with {template.ending.turn.strip()!r}, which is no special token of this tokenizer: it is "
        f"trained as text with {template.tokenizer.eos_token!r} after it, and a reply stops at either"
    )


def _said(template: Template, note: Note, example: Comparison) -> str:
    if note is Note.OPENING:
        return _opening(template, example)
    if note is Note.PRELUDE:
        return f"the template writes {_prelude(template, example)!r} before the reply. It is read, and not trained"
    if note in (Note.REPLY_LEFT_OUT, Note.PROMPT_LEFT_OUT):
        return _left_out(template, note, example)
    if note is Note.APART:
        asked = write_prompt(template, example).text
        return (
            f"one token would cover the prompt's end {asked[-_SHOWN:]!r} and the reply's beginning {example.responses[0][:_SHOWN]!r}. "
            "They are encoded apart, as the model meets them when it generates"
        )
    where = "a reply" if note is Note.REPLY_MARKS else "the prompt"
    replies = [message for place in range(len(example.responses)) for message in example.reply(place)]
    messages = replies if note is Note.REPLY_MARKS else example.prompt
    mark = marks_in(template, messages)[0]
    text = next(text for message in messages for text in texts_of(message) if mark in text)
    place = text.index(mark)
    piece = text[max(place - _SHOWN, 0) : place + len(mark)]
    if template.kind == "plain":
        return f"{where} holds {mark!r} ({piece!r}), which is read as that special token and not as text"
    effect = "it is encoded as text" if note is Note.REPLY_MARKS else "it is read as the template's own"
    return (
        f"{where} holds {mark!r}, a mark of the chat template ({piece!r}); {effect}. Where the data is written with the template "
        "already, write tokens.template: plain"
    )


def _left_out(template: Template, note: Note, example: Comparison) -> str:
    asked = write_prompt(template, example)
    if note is Note.PROMPT_LEFT_OUT:
        whose, names = "the prompt", left_out_of_prompt(example, asked.text)
    else:
        replies = [write_reply(template, example, place, asked) for place in range(len(example.responses))]
        lost = [
            left_out_of_reply(example.reply(place), written.text[written.own[0][0] :])
            for place, written in enumerate(replies)
            if written.own
        ]
        whose, names = "a reply", next(found for found in lost if found)
    return (
        f"{whose} holds {', '.join(names)}, which the chat template does not write as it is, so the model does not see it. "
        "Use a model whose template does, or take it out of the data"
    )


def _opening(template: Template, example: Comparison) -> str:
    (split,) = split_all([example], template)
    decode = template.tokenizer.decode
    asked = str(decode([*split.prompt[-12:], *split.opening]))
    written = str(decode([*split.prompt[-12:], *_first(template, example)]))
    choices = ", ".join(template.choices)
    advice = f" (the template reads {choices}: see tokens.chat_template_kwargs)" if choices else ""
    return f"the template asks for a reply with {asked!r} and writes one as {written!r}. The rows follow the second{advice}"


def _first(template: Template, example: Comparison) -> list[int]:
    """The first ids of a reply's row after the prompt's."""
    (split,) = split_all([example], template)
    own = split.responses[0]
    context = own.context[0].ids if own.context and own.context[0].before == 0 else []
    return [*context, *own.ids][: len(split.opening) + 8]


def _prelude(template: Template, example: Comparison) -> str:
    (split,) = split_all([example], template)
    found = (insert.ids for own in split.responses for insert in own.context if insert.before == 0)
    return str(template.tokenizer.decode(next(found)))


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


def encode(
    comparisons: Iterable[Comparison], template: Template, limits: Limits, *, may_be_empty: bool = False
) -> tuple[list[TokenRow], dict[str, int]]:
    """Encode comparisons; what would leave nothing to train on is dropped and counted.

    Returns:
        The rows that are left, and how many comparisons were read, dropped or changed, by reason.

    Raises:
        UserError: a row is too long and ``limits.too_long`` is ``"error"``, or nothing is left and
            that may not be.
    """
    rows: list[TokenRow] = []
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
    return rows, dict(counts)


def check_some_left(counts: Mapping[str, int]) -> None:
    """Refuse to go on with nothing, and say why nothing is left.

    Raises:
        UserError: no comparison was kept.
    """
    if counts["kept"]:
        return
    reasons = {name: count for name, count in counts.items() if name.startswith("dropped")}
    listed = ", ".join(f"{name}: {count}" for name, count in reasons.items())
    long = any("too long" in name or "context" in name for name in reasons)
    advice = (
        "Raise tokens.max_prompt_tokens or tokens.max_response_tokens, or write tokens.too_long: truncate."
        if long
        else "Use a model whose chat template writes what these rows hold, or take them out of the data."
    )
    raise UserError(
        f"no comparison is left after encoding {counts['read']} ({listed or 'there were none'}). {advice}"
    )


def encode_one(
    comparison: Comparison, template: Template, limits: Limits
) -> tuple[TokenRow | None, list[str]]:
    """One comparison as ids, or None, with the reasons of what was dropped or changed."""
    (parts,) = encode_parts([comparison], template, limits)
    kept, notes = judge(parts.sizes, limits, comparison.source, lambda: _all_same(parts.responses))
    if not kept:
        return None, notes
    return parts.encoded(comparison, limits), notes


def _all_same(responses: Sequence[Response]) -> bool:
    return len(responses) > 1 and len({tuple(own.ids) for own in responses}) < 2


class RowParts(NamedTuple):
    """Prompt and responses as ids, before it is judged what becomes of them.

    Attributes:
        prompt: Within the limit.
        prompt_length: Of the whole prompt.
        opening: See :class:`TokenRow`.
        responses: Each within the limit.
        notes: What there is to say of the prompt, bits of :class:`tokenward.tokens.split.Note`.
    """

    prompt: list[int]
    prompt_length: int
    opening: list[int]
    responses: list[Response]
    notes: int

    @property
    def sizes(self) -> "Sizes":
        """What is judged."""
        notes = reduce(or_, (own.notes for own in self.responses), self.notes)
        lengths, preludes = [own.length for own in self.responses], [own.prelude for own in self.responses]
        return Sizes(self.prompt_length, len(self.prompt), lengths, preludes, notes)

    def encoded(self, comparison: Comparison, limits: Limits) -> TokenRow:
        """The comparison as rows are made of it."""
        context = [own.context for own in self.responses]
        return TokenRow(
            comparison,
            self.prompt,
            [own.ids for own in self.responses],
            [own.eos if own.length <= limits.max_response_tokens else 0 for own in self.responses],
            context if any(context) else (),
            self.opening,
        )


def encode_parts(comparisons: Sequence[Comparison], template: Template, limits: Limits) -> list[RowParts]:
    """Ids of comparisons, which are best some hundreds: the tokenizer takes them at once."""
    found = split_all(comparisons, template)
    return [
        _within_limits(comparison, parts, template, limits)
        for comparison, parts in zip(comparisons, found, strict=True)
    ]


def _within_limits(comparison: Comparison, whole: UncutRow, template: Template, limits: Limits) -> RowParts:
    prompt = whole.prompt
    if len(prompt) > limits.max_prompt_tokens:
        # Unless it is to be cut, a comparison with such a prompt is dropped, whatever its ids.
        prompt = _shorten_prompt(comparison, whole, template, limits) if limits.too_long == "truncate" else []
    responses = [own.cut(limits.max_response_tokens) for own in whole.responses]
    return RowParts(prompt, len(whole.prompt), whole.opening, responses, whole.notes)


class Sizes(NamedTuple):
    """What :func:`judge` looks at, in tokens.

    Attributes:
        prompt: Of the whole prompt.
        kept: Of the prompt within the limit.
        responses: Of the whole responses.
        preludes: Of what the template writes before each.
        notes: Of the comparison, bits of :class:`tokenward.tokens.split.Note`.
    """

    prompt: int
    kept: int
    responses: Sequence[int]
    preludes: Sequence[int]
    notes: int


def judge(sizes: Sizes, limits: Limits, source: str, same: Callable[[], bool]) -> tuple[bool, list[str]]:
    """Whether a comparison stays, with the reasons of what was dropped or changed.

    Args:
        sizes: Of the comparison.
        limits: To keep within.
        source: Where the comparison came from.
        same: Whether all of several responses are the same once they are cut.

    Raises:
        UserError: it is too long and ``limits.too_long`` is ``"error"``.
    """
    longest = max(sizes.responses, default=0)
    refused = _unusable(sizes) or _too_long(source, sizes.prompt, longest, limits)
    if refused is not None:
        return False, [refused]
    notes = []
    if sizes.prompt > limits.max_prompt_tokens:
        notes.append("note: prompt truncated")
    if longest > limits.max_response_tokens:
        notes.append("note: response truncated")
    if same():
        cut_off = " after truncation" if longest > limits.max_response_tokens else ""
        return False, [f"dropped: responses are the same{cut_off or ', token by token'}"]
    both = zip(sizes.preludes, sizes.responses, strict=True)
    widest = max((before + min(length, limits.max_response_tokens) for before, length in both), default=0)
    if limits.context is not None and sizes.kept + widest > limits.context:
        return False, ["dropped: longer than the model's context"]
    return True, notes + [reason for note, reason in SAID.items() if sizes.notes & note]


def _unusable(sizes: Sizes) -> str | None:
    """Reason to drop a comparison that cannot be written, or has nothing to go on from; None if it can."""
    noted = (reason for note, reason in DROPPED.items() if sizes.notes & note)
    return next(noted, None if sizes.prompt else "dropped: empty prompt")


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


def _shorten_prompt(comparison: Comparison, whole: UncutRow, template: Template, limits: Limits) -> list[int]:
    """Drop the oldest turns (never a system message, never the last turn), then tokens from the left."""
    limit, messages = limits.max_prompt_tokens, comparison.prompt
    head = [message for message in messages[:1] if message["role"] == "system"]
    turns, ids = list(messages[len(head) :]), whole.prompt
    while len(ids) > limit and len(turns) > 1:
        # Templates want a user's turn first: what answered the dropped turn goes with it.
        turns = turns[1:]
        while len(turns) > 1 and turns[0]["role"] != "user":
            turns = turns[1:]
        if turns[0]["role"] != "user":
            break  # a question goes only with its answer
        ids = asked_ids([*head, *turns], comparison.tools, template, whole.opening)
    return ids[-limit:]


def asked_ids(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    template: Template,
    opening: Sequence[int],
) -> list[int]:
    """Ids of another prompt for the same replies.

    Args:
        messages: The prompt.
        tools: What the assistant may call.
        template: Writes it.
        opening: What of the prompt the rows of the replies do not begin with.

    Raises:
        UserError: the template asks for a reply to this prompt in another way.
    """
    ids = template.prompt_ids(messages, tools)
    rest = len(ids) - len(opening)
    if ids[rest:] != list(opening):
        raise UserError(
            "the chat template asks for a reply to a shortened or changed prompt in another way than to the whole one. Raise "
            "tokens.max_prompt_tokens, or write tokens.too_long: drop."
        )
    return ids[:rest]
