"""Comparisons to token ids within limits. Everything that is dropped or changed is counted."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import Any, Literal, NamedTuple

from tokenward.errors import UserError
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.split import DROPPED, SAID, Note, Response, RowIds, marks_in, split_all
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
"""Placeholder for the last user turn in the prompt of an auxiliary model."""

TooLong = Literal["drop", "truncate", "error"]


class Limits(NamedTuple):
    """Maximum lengths in tokens, and what happens to longer comparisons."""

    max_prompt_tokens: int  # limit of the prompt, with the template
    max_response_tokens: int  # limit of each response, with its eos tokens
    too_long: TooLong = "drop"  # drop the comparison, truncate it, or stop with an error
    context: int | None = None  # context length of the model. A comparison that needs more is always dropped

    @property
    def of_prompts(self) -> "Limits":
        """The limits of comparisons of which the prompt alone is read: their responses may have any length."""
        return self._replace(max_response_tokens=sys.maxsize, context=None)


def encode(
    comparisons: Iterable[Comparison], template: Template, limits: Limits, *, may_be_empty: bool = False
) -> tuple[list[TokenRow], dict[str, int]]:
    """The rows of some comparisons, and how many were read, kept, dropped or changed, by reason.

    Raises:
        UserError: A comparison is too long and ``limits.too_long`` is ``"error"``, or none is left and ``may_be_empty`` is
            false.
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
    """Raises a UserError with the reasons if no comparison was kept."""
    if counts["kept"]:
        return
    reasons = {name: count for name, count in counts.items() if name.startswith("dropped")}
    listed = ", ".join(f"{name}: {count}" for name, count in reasons.items())
    long = any("too long" in name or "context" in name for name in reasons)
    advice = (
        "Raise max_prompt_tokens or max_response_tokens, or set too_long: truncate."
        if long
        else "Use a model whose chat template writes these rows, or remove them from the data."
    )
    raise UserError(
        f"no comparison is left after encoding {counts['read']} ({listed or 'there were none'}). {advice}",
        code="no-rows",
        key="tokens" if long else "data.source",
    )


def encode_one(
    comparison: Comparison, template: Template, limits: Limits
) -> tuple[TokenRow | None, list[str]]:
    """The row of a comparison, or None if it is dropped, and the reasons for what was dropped or changed."""
    (row,) = encode_parts([comparison], template, limits)
    kept, notes = judge(_sizes(row), limits, comparison.source, lambda: _all_same(row.responses))
    if not kept:
        return None, notes
    context = [own.context for own in row.responses]
    encoded = TokenRow(
        comparison,
        row.prompt,
        [own.ids for own in row.responses],
        [eos_left(own, limits) for own in row.responses],
        context if any(context) else (),
        row.opening,
    )
    return encoded, notes


def eos_left(own: Response, limits: Limits) -> int:
    """Number of eos tokens of a response within the limits."""
    return own.eos if own.length <= limits.max_response_tokens else 0


def encode_parts(comparisons: Sequence[Comparison], template: Template, limits: Limits) -> list[RowIds]:
    """Ids of comparisons, truncated to the limits. Best called for hundreds at once, which the tokenizer batches."""
    found = split_all(comparisons, template)
    return [
        _within_limits(comparison, whole, template, limits)
        for comparison, whole in zip(comparisons, found, strict=True)
    ]


def _within_limits(comparison: Comparison, whole: RowIds, template: Template, limits: Limits) -> RowIds:
    prompt = whole.prompt
    if len(prompt) > limits.max_prompt_tokens:
        # Without truncation the comparison will be dropped, whatever the ids are.
        prompt = _shorten_prompt(comparison, whole, template, limits) if limits.too_long == "truncate" else []
    return whole._replace(
        prompt=prompt, responses=[own.cut(limits.max_response_tokens) for own in whole.responses]
    )


class Sizes(NamedTuple):
    """The sizes of a comparison in tokens, for :func:`judge`."""

    prompt: int  # length of the whole prompt
    kept: int  # length of the prompt after truncation
    responses: Sequence[int]  # lengths of the whole responses
    preludes: Sequence[int]  # number of tokens that the template writes before each response
    notes: int  # notes of the comparison; see Note


def _sizes(row: RowIds) -> Sizes:
    notes = reduce(or_, (own.notes for own in row.responses), row.notes)
    lengths, preludes = [own.length for own in row.responses], [own.prelude for own in row.responses]
    return Sizes(row.prompt_length, len(row.prompt), lengths, preludes, notes)


def _all_same(responses: Sequence[Response]) -> bool:
    return len(responses) > 1 and len({tuple(own.ids) for own in responses}) < 2


def judge(sizes: Sizes, limits: Limits, source: str, same: Callable[[], bool]) -> tuple[bool, list[str]]:
    """Whether a comparison is kept, and the reasons for what was dropped or changed.

    Args:
        sizes: Sizes of the comparison.
        limits: The limits.
        source: Where the comparison came from, for errors.
        same: Whether there are several responses and all are equal after truncation.

    Raises:
        UserError: The comparison is too long and ``limits.too_long`` is ``"error"``.
    """
    longest = max(sizes.responses, default=0)
    refused = _unusable(sizes) or _too_long(source, sizes.prompt, longest, limits)
    if refused is not None:
        return False, [refused]
    notes = []
    if sizes.prompt > limits.max_prompt_tokens:
        notes.append("note: prompt truncated to max_prompt_tokens")
    if longest > limits.max_response_tokens:
        notes.append("note: response truncated to max_response_tokens")
    if same():
        when = " after truncation" if longest > limits.max_response_tokens else ""
        return False, [f"dropped: responses have the same tokens{when}"]
    both = zip(sizes.preludes, sizes.responses, strict=True)
    widest = max((before + min(length, limits.max_response_tokens) for before, length in both), default=0)
    if limits.context is not None and sizes.kept + widest > limits.context:
        return False, ["dropped: longer than the model's context"]
    return True, notes + _noted(SAID, sizes.notes)


def _noted(reasons: Mapping[Note, str], notes: int) -> list[str]:
    return [reason for note, reason in reasons.items() if notes & note] if notes else []


def _unusable(sizes: Sizes) -> str | None:
    return next(iter(_noted(DROPPED, sizes.notes)), None if sizes.prompt else "dropped: empty prompt")


def _too_long(source: str, prompt: int, longest: int, limits: Limits) -> str | None:
    over_prompt, over_response = prompt > limits.max_prompt_tokens, longest > limits.max_response_tokens
    if not (over_prompt or over_response) or limits.too_long == "truncate":
        return None
    if limits.too_long == "drop":
        return "dropped: prompt too long" if over_prompt else "dropped: response too long"
    raise UserError(
        f"{source}: the prompt has {prompt} tokens and the longest response {longest}, but only {limits.max_prompt_tokens} and "
        f"{limits.max_response_tokens} are allowed. Raise max_prompt_tokens or max_response_tokens, or set too_long to drop "
        "or truncate.",
        code="too-long",
        key="tokens.max_prompt_tokens" if over_prompt else "tokens.max_response_tokens",
    )


def _shorten_prompt(comparison: Comparison, whole: RowIds, template: Template, limits: Limits) -> list[int]:
    """Removes the oldest turns (never the system message or the last turn), then tokens from the left."""
    limit, messages = limits.max_prompt_tokens, comparison.prompt
    head = [message for message in messages[:1] if message["role"] == "system"]
    turns, ids = list(messages[len(head) :]), whole.prompt
    while len(ids) > limit and len(turns) > 1:
        # Many templates require the first turn to be the user's, so the answers to a removed turn are removed with it.
        turns = turns[1:]
        while len(turns) > 1 and turns[0]["role"] != "user":
            turns = turns[1:]
        if turns[0]["role"] != "user":
            break
        ids = _prompt_ids([*head, *turns], comparison.tools, template, whole.opening)
    return ids[-limit:]


def _prompt_ids(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    template: Template,
    opening: Sequence[int],
) -> list[int]:
    """Ids of another prompt for the same replies, without the opening, which the rows do not contain."""
    ids = template.prompt_ids(messages, tools)
    rest = len(ids) - len(opening)
    if ids[rest:] != list(opening):
        raise UserError(
            "the chat template begins the reply to a shortened or changed prompt in another way than the reply to the whole "
            "prompt. Raise max_prompt_tokens, or set too_long: drop.",
            code="changed-opening",
            key="tokens.too_long",
        )
    return ids[:rest]


def prompted(row: TokenRow, template: Template, text: str | None, context: int | None) -> TokenRow:
    """A row with the prompt of an auxiliary model. The ids of the responses are the same, and so are their values' tokens.

    Args:
        row: The row of the policy.
        template: Template of the auxiliary model.
        text: Its prompt, in which ``{prompt}`` stands for the last user turn; None leaves the row unchanged.
        context: Context length of the model, or None.

    Raises:
        UserError: The row has no user turn, or is too long with the new prompt.
    """
    if text is None:
        return row
    source = row.comparison.source
    messages = with_prompt(row.comparison.prompt, text, source)
    ids = _prompt_ids(messages, row.comparison.tools, template, row.opening)
    longest = len(ids) + max(map(row.size, range(len(row.responses))))
    if context is not None and longest > context:
        raise UserError(
            f"{source} has {longest} tokens with the auxiliary model's prompt, but the model's context is {context}. Shorten the "
            "prompt, or lower max_prompt_tokens or max_response_tokens.",
            code="too-long",
            key="tokens.max_prompt_tokens",
        )
    return replace(row, prompt=ids)


def with_prompt(messages: tuple[Message, ...], text: str, source: str) -> tuple[Message, ...]:
    """A conversation with its last user turn inserted into a text, in place of ``{prompt}``.

    Raises:
        UserError: There is no user turn.
    """
    places = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if not places:
        raise UserError(
            f"{source} has no user turn, so an auxiliary model's prompt cannot be used for it. Leave prompt out.",
            code="no-user-turn",
        )
    last = places[-1]
    changed = Message(role="user", content=text.replace(PLACE, messages[last]["content"]))
    return (*messages[:last], changed, *messages[last + 1 :])


_SHOWN = 40


def notes_of(template: Template, comparison: Comparison) -> int:
    """All notes of a comparison; see :class:`tokenward.tokens.split.Note`."""
    (split,) = split_all([comparison], template)
    return _sizes(split).notes


_NOTHING = "Nothing is to be done"


def explanations(
    template: Template, examples: Mapping[Note, Comparison], counts: Mapping[str, int]
) -> list[str]:
    """A line for each note.

    Args:
        template: Template that wrote the rows.
        examples: For each note a comparison that has it.
        counts: Number of comparisons with each note, by its text in :data:`tokenward.tokens.split.SAID`.
    """
    lines = []
    if not template.ending.special:
        lines.append(
            f"  the template ends a reply with {template.ending.turn.strip()!r}, which is not a special token of this tokenizer. "
            f"It is trained as text, followed by {template.tokenizer.eos_token!r}, and generation stops at either. {_NOTHING}"
        )
    if template.writes_clock:
        lines.append(
            "  the chat template computes the text of the time, so rows that are encoded on another day differ. If the "
            "template has a variable for the date, set it in chat_template_kwargs"
        )
    for note, example in examples.items():
        count = counts[SAID[note]]
        rows = f"{count} {'row' if count == 1 else 'rows'}"
        lines.append(f"  {rows}, such as {example.source}: {_explained(template, note, example)}")
    return lines


def _explained(template: Template, note: Note, example: Comparison) -> str:
    if note is Note.OPENING:
        return _opening(template, example)
    if note is Note.PRELUDE:
        (split,) = split_all([example], template)
        found = (insert.ids for own in split.responses for insert in own.context if insert.before == 0)
        prelude = str(template.tokenizer.decode(next(found)))
        return f"the template writes {prelude!r} before the reply, which is read but not trained. {_NOTHING}"
    if note in (Note.REPLY_LEFT_OUT, Note.PROMPT_LEFT_OUT):
        whose, names = _left_out(template, note, example)
        return (
            f"{whose} has {', '.join(names)}, which the chat template leaves out or changes, so the model does not see it. Use a "
            "model whose template writes it, or remove it from the data"
        )
    if note is Note.ROLES_LEFT_OUT:
        whose = ", ".join(message["role"] for message in example.prompt)
        return (
            f"its messages ({whose}) are joined by a blank line, so the model cannot tell who says what. Use template: chat, if the "
            "tokenizer has a chat template; or write the roles into the text of a prompt that is a single message"
        )
    if note is Note.APART:
        end, begin = write_prompt(template, example).text[-_SHOWN:], example.responses[0][:_SHOWN]
        return (
            f"encoded together, one token would cover the end of the prompt {end!r} and the beginning of the reply {begin!r}. They are "
            f"encoded apart, because the model also generates after a whole prompt. {_NOTHING}"
        )
    return _marks(template, note, example)


def _opening(template: Template, example: Comparison) -> str:
    (split,) = split_all([example], template)
    own, decode = split.responses[0], template.tokenizer.decode
    context = own.context[0].ids if own.context and own.context[0].before == 0 else []
    first = [*context, *own.ids][: len(split.opening) + 8]
    asked, written = (str(decode([*split.prompt[-12:], *ids])) for ids in (split.opening, first))
    choices = ", ".join(template.choices)
    advice = (
        f"To make both equal, set a variable of the template in chat_template_kwargs: {choices}"
        if choices
        else f"The template has no variable that changes this. {_NOTHING}"
    )
    return (
        f"the template asks for a reply with {asked!r}, but writes one as {written!r}. Rows are trained as the second, and the model "
        f"generates after the first. {advice}"
    )


def _left_out(template: Template, note: Note, example: Comparison) -> tuple[str, list[str]]:
    prompt = write_prompt(template, example)
    if note is Note.PROMPT_LEFT_OUT:
        return "the prompt", left_out_of_prompt(example, prompt.text)
    replies = (write_reply(template, example, place, prompt) for place in range(len(example.responses)))
    found = (
        left_out_of_reply(example.reply(place), reply.text[reply.own[0][0] :])
        for place, reply in enumerate(replies)
        if reply.own
    )
    return "a reply", next(names for names in found if names)


def _marks(template: Template, note: Note, example: Comparison) -> str:
    in_reply = note is Note.REPLY_MARKS
    replies = [message for place in range(len(example.responses)) for message in example.reply(place)]
    messages = replies if in_reply else example.prompt
    mark = marks_in(template, messages)[0]
    text = next(text for message in messages for text in texts_of(message) if mark in text)
    place = text.index(mark)
    piece = text[max(place - _SHOWN, 0) : place + len(mark)]
    where = "a reply" if in_reply else "the prompt"
    if template.kind == "plain":
        return (
            f"{where} contains {mark!r} ({piece!r}), which is read as that special token, not as text. This is right if the data "
            "contains a chat template; if not, remove it from the data"
        )
    effect, otherwise = (
        ("it is encoded as text", "if not, nothing is to be done")
        if in_reply
        else ("it is read as the template's own", "if not, remove it from the data")
    )
    return (
        f"{where} contains {mark!r}, a mark of the chat template ({piece!r}); {effect}. If the data already contains the chat "
        f"template, use template: plain; {otherwise}"
    )
