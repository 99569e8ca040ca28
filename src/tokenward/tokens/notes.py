"""What a run says of how its rows are written: each note with the texts of an example."""

from collections.abc import Mapping
from functools import reduce
from operator import or_

from tokenward.tokens.split import SAID, Note, marks_in, split_all
from tokenward.tokens.template import Template
from tokenward.tokens.writing import (
    left_out_of_prompt,
    left_out_of_reply,
    texts_of,
    write_prompt,
    write_reply,
)
from tokenward.types import Comparison

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
