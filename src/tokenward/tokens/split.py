"""A conversation's tokens, split into those of the prompt, those that the assistant writes, and what stands between.

The whole conversation is encoded as the template writes it, and split where the prompt and the replies meet. Where one
token would cover both, or a reply spells a mark of the template, the reply is encoded apart, and that is noted.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from enum import IntFlag
from typing import NamedTuple

from tokenizers import Encoding

from tokenward.errors import UserError
from tokenward.tokens.template import Template
from tokenward.tokens.writing import (
    ConversationText,
    PromptText,
    Unplaced,
    goes_on,
    left_out_of_prompt,
    left_out_of_reply,
    texts_of,
    write_prompt,
    write_reply,
)
from tokenward.types import Comparison, Message


class Note(IntFlag):
    """What there is to say of a comparison's rows."""

    OPENING = 1
    PRELUDE = 2
    APART = 4
    REPLY_MARKS = 8
    PROMPT_MARKS = 16
    UNPLACED = 32
    CUT_AWAY = 64
    UNWRITTEN = 128
    WEIGHTLESS = 1024
    BEGUN = 2048
    REPLY_LEFT_OUT = 256
    PROMPT_LEFT_OUT = 512


SAID: dict[Note, str] = {
    Note.APART: "note: joint encoding differs at the boundary",
    Note.OPENING: "note: the template begins a reply in another way than it asks for one",
    Note.PRELUDE: "note: the template writes something before a reply",
    Note.REPLY_MARKS: "note: a reply holds marks of the template, or special tokens",
    Note.PROMPT_MARKS: "note: the prompt holds marks of the template",
    Note.REPLY_LEFT_OUT: "note: the template leaves out a part of a reply",
    Note.PROMPT_LEFT_OUT: "note: the template leaves out calls or tools of the prompt",
}
"""Notes of rows that are kept."""

DROPPED: dict[Note, str] = {
    Note.UNPLACED: "dropped: the template does not write the reply's messages one after another",
    Note.UNWRITTEN: "dropped: the template writes nothing of a reply",
    Note.WEIGHTLESS: "dropped: no message of a reply has weight",
    Note.BEGUN: "dropped: the prompt ends with an assistant's call, or with a thought beside a reply's own, where no reply goes on",
    Note.CUT_AWAY: "dropped: nothing of a response is left after truncation",
}
"""Notes of rows that are not."""


class Insert(NamedTuple):
    """Tokens inside a response that the assistant does not write: read by the model, without a number of their own.

    Attributes:
        before: Place of the response's token that follows them.
        ids: Their ids.
    """

    before: int
    ids: list[int]


class Response(NamedTuple):
    """A response as ids.

    Attributes:
        ids: Those that the assistant writes, the end of its turn included.
        context: What stands among them.
        length: Tokens in all, before anything was cut; those that the template writes before the reply are not counted.
        eos: Tokens at the end that are no text.
        notes: See :class:`Note`.
    """

    ids: list[int]
    context: list[Insert]
    length: int
    eos: int
    notes: int = 0

    @property
    def prelude(self) -> int:
        """Tokens that stand before the first of its own."""
        return sum(len(insert.ids) for insert in self.context if not insert.before)

    def cut(self, limit: int) -> "Response":
        """The first ``limit`` tokens of it, ending with one that the assistant writes."""
        if self.length <= limit:
            return self
        kept, total, before = 0, 0, 0
        for insert in (*self.context, Insert(len(self.ids), [])):
            kept += max(min(insert.before - before, limit - total), 0)
            total += insert.before - before + (len(insert.ids) if insert.before else 0)
            before = insert.before
        return self._replace(
            ids=self.ids[:kept],
            context=[insert for insert in self.context if insert.before < kept],
            notes=self.notes | (0 if kept else Note.CUT_AWAY),
        )


class UncutRow(NamedTuple):
    """A comparison as ids, before anything is cut.

    Attributes:
        prompt: Ids with which the rows of all replies to this prompt begin.
        opening: What follows them when the model generates; mostly nothing.
        responses: In the comparison's order; one without tokens has a note that says why.
        notes: Of the prompt; see :class:`Note`.
    """

    prompt: list[int]
    opening: list[int]
    responses: list[Response]
    notes: int


class _Tokens(NamedTuple):
    """A text as ids.

    Attributes:
        text: The text.
        ids: Of the whole text.
        starts: Character at which each token begins; 0 for those that the tokenizer wrote before the text.
        ends: Character after its last one.
    """

    text: str
    ids: list[int]
    starts: list[int]
    ends: list[int]

    def covering(self, character: int) -> int:
        """The token that covers a character, or the next one where the tokenizer's normaliser took it away."""
        return bisect_right(self.ends, character)

    def behind(self, character: int) -> int:
        """The first token that begins at a character or after it."""
        return bisect_left(self.starts, character)


def split_all(comparisons: Sequence[Comparison], template: Template) -> list[UncutRow]:
    """Comparisons as ids; many at once cost a fraction of one by one.

    Raises:
        UserError: the template refuses a conversation.
    """
    if template.encoder:
        return [_apart(comparison, template) for comparison in comparisons]
    asked = [write_prompt(template, comparison) for comparison in comparisons]
    written = [_written(template, *both) for both in zip(comparisons, asked, strict=True)]
    replies = [reply.text for found in written for reply in found if reply is not None]
    tokens = iter(_tokens(template, [*(item.text for item in asked), *replies]))
    prompts = [next(tokens) for _ in asked]
    splits = []
    for comparison, prompt, found in zip(comparisons, prompts, written, strict=True):
        both = [(reply, next(tokens)) if reply else None for reply in found]
        own = [
            one if one is None or one[0].hidden is None else (one[0], _unmarked(template, one[0]))
            for one in both
        ]
        splits.append(_split(template, comparison, prompt, own))
    return splits


def _tokens(template: Template, texts: Sequence[str]) -> list[_Tokens]:
    return [
        _with_first(template, text, *_places(item))
        for text, item in zip(texts, template.encodings(texts), strict=True)
    ]


def _places(encoding: Encoding) -> tuple[list[int], list[int], list[int]]:
    offsets = encoding.offsets
    return encoding.ids, [start for start, _ in offsets], [end for _, end in offsets]


def _with_first(template: Template, text: str, ids: list[int], starts: list[int], ends: list[int]) -> _Tokens:
    none = [0] * len(template.first_ids)
    return _Tokens(text, [*template.first_ids, *ids], [*none, *starts], [*none, *ends])


def _unmarked(template: Template, written: ConversationText) -> _Tokens:
    """A conversation's tokens in which marks that a reply spells are text, and the template's own are marks."""
    ids, starts, ends = list[int](), list[int](), list[int]()
    place, hidden = 0, written.hidden or written.text
    for mark in [*template.special_marks.finditer(hidden), None]:
        end = len(hidden) if mark is None else mark.start()
        pieces = [(written.text[place:end], template.spelling)] if end > place else []
        pieces += [] if mark is None else [(mark.group(), template.encodings)]
        for text, encode in pieces:
            (encoding,) = encode([text])
            own, first, last = _places(encoding)
            ids += own
            starts += [place + start for start in first]
            ends += [place + start for start in last]
            place += len(text)
    return _with_first(template, written.text, ids, starts, ends)


def _split(
    template: Template,
    comparison: Comparison,
    prompt: _Tokens,
    replies: Sequence[tuple[ConversationText, _Tokens] | None],
) -> UncutRow:
    """The rows follow the whole conversations; the prompt is what all of them begin with of what the model is asked with."""
    # A plain prompt is text like its reply, and is asked with as it is: it keeps all its tokens.
    followed = [reply[1].ids for reply in replies if reply and template.kind == "chat"]
    trunk = min((_same(prompt.ids, ids) for ids in followed), default=len(prompt.ids))
    notes = Note.OPENING if trunk < len(prompt.ids) else Note(0)
    # A plain prompt is written with its marks.
    written = comparison.prompt if template.kind == "chat" else ()
    if marks_in(template, written):
        notes |= Note.PROMPT_MARKS
    if left_out_of_prompt(comparison, prompt.text):
        notes |= Note.PROMPT_LEFT_OUT
    if not goes_on(comparison):
        notes |= Note.BEGUN
    responses = [
        _response(template, prompt, trunk, *reply, messages=comparison.reply(place)) if reply else _UNPLACED
        for place, reply in enumerate(replies)
    ]
    return UncutRow(prompt.ids[:trunk], prompt.ids[trunk:], responses, notes)


def _same(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many ids two lists begin with in common."""
    if ids == others[: len(ids)]:
        return len(ids)
    return next(
        (place for place, (one, other) in enumerate(zip(ids, others, strict=False)) if one != other),
        len(others),
    )


_UNPLACED = Response([], [], 0, 0, Note.UNPLACED)


def _written(template: Template, comparison: Comparison, asked: PromptText) -> list[ConversationText | None]:
    """The replies of a comparison; None for one that cannot be placed."""
    found: list[ConversationText | None] = []
    for place in range(len(comparison.responses)):
        try:
            found.append(write_reply(template, comparison, place, asked))
        except Unplaced:  # counted as such
            found.append(None)
    return found


def _response(
    template: Template,
    prompt: _Tokens,
    trunk: int,
    reply: ConversationText,
    tokens: _Tokens,
    *,
    messages: Sequence[Message],
) -> Response:
    """One response, out of the whole conversation or, where prompt and reply share a token in plain text, apart from it."""
    if not reply.own:
        return Response([], [], 0, 0, Note.WEIGHTLESS)
    notes = Note.REPLY_MARKS if marks_in(template, messages) else Note(0)
    if prompt.ids[:trunk] != tokens.ids[:trunk]:
        notes |= Note.APART
        own = _by_pieces(template, prompt, trunk, reply)
    else:
        # What a reply is asked with is none of its own, however much of it the rows of other replies begin with.
        asked = _same(prompt.ids, tokens.ids) if template.kind == "chat" else trunk
        own = _together(template, (trunk, asked), reply, tokens)
    if template.kind == "chat" and left_out_of_reply(messages, reply.text[reply.own[0][0] :]):
        notes |= Note.REPLY_LEFT_OUT
    if len(own.ids) == own.eos:
        notes |= Note.UNWRITTEN
    return own._replace(notes=own.notes | notes)


def marks_in(template: Template, messages: Sequence[Message]) -> list[str]:
    """Marks of the template that messages spell."""
    if template.marks is None:
        return []
    texts = [text for message in messages for text in texts_of(message)]
    if template.kind == "plain" and messages:
        texts = [message["content"] for message in messages]
        texts[-1] = template.without_end(texts[-1])
    return [found.group() for text in texts for found in template.marks.finditer(text)]


def _together(
    template: Template, begun: tuple[int, int], reply: ConversationText, tokens: _Tokens
) -> Response:
    """A response out of the whole conversation's tokens, of which the first are the trunk's and what is asked with."""
    ids = tokens.ids
    places = [
        (tokens.covering(start), len(ids) if end is None else tokens.behind(end)) for start, end in reply.own
    ]
    start, end = places[-1]
    eos: list[int] = []
    if reply.own[-1][1] is None:
        end, eos = _closed_by_marks(template, ids, start)
    elif reply.ends:
        text = tokens.behind(len(reply.text.rstrip("\n")))
        eos = eos_ids(template, ids[end:], ids[end:text])
    return _made(*begun, ids, [*places[:-1], (start, end)], eos)


def _made(
    trunk: int,
    asked: int,
    ids: Sequence[int],
    places: Sequence[tuple[int, int]],
    eos: Sequence[int],
) -> Response:
    """A response from the places of its own tokens in the whole conversation; none is before ``asked``."""
    own, context, reached = list[int](), list[Insert](), trunk
    for start, end in places:
        start = max(start, reached, asked)
        if start > reached:
            context.append(Insert(len(own), list(ids[reached:start])))
        own += ids[start:end]
        reached = max(end, start)
    own += eos
    total = len(own) + sum(len(insert.ids) for insert in context if insert.before)
    made = Response(own, context, total, len(eos))
    return made._replace(notes=Note.PRELUDE if made.prelude else 0)


def eos_ids(template: Template, behind: Sequence[int], text: Sequence[int]) -> list[int]:
    """What ends a reply.

    Args:
        template: That wrote it.
        behind: All tokens after the reply's text.
        text: Those of them that are not the last line breaks.
    """
    count = template.ends_after(behind)
    if count:
        return list(behind[:count])
    blank = not str(template.tokenizer.decode(list(text))).strip()
    return [*([] if blank else text), template.ending.ids[-1]]


def _closed_by_marks(template: Template, ids: Sequence[int], start: int) -> tuple[int, list[int]]:
    """Where the text of a conversation's last message ends, and what closes it: the special tokens at the end."""
    last = len(ids)
    while last > start and ids[last - 1] not in template.special_ids and _is_break(template, ids[last - 1]):
        last -= 1
    first = last
    while first > start and ids[first - 1] in template.special_ids:
        first -= 1
    return first, list(ids[first:last]) or [template.ending.ids[-1]]


def _is_break(template: Template, token: int) -> bool:
    return not str(template.tokenizer.decode([token])).strip()


def _by_pieces(template: Template, prompt: _Tokens, trunk: int, reply: ConversationText) -> Response:
    """A plain response whose texts are encoded apart from what stands around them."""
    ids, places, reached = prompt.ids[:trunk], list[tuple[int, int]](), len(prompt.text)
    for start, end in reply.own:
        ids += template.written_ids(reply.text[reached:start])
        reached = len(reply.text) if end is None else end
        begin = len(ids)
        ids += template.written_ids(reply.text[start:reached])
        places.append((begin, len(ids)))
    return _made(trunk, trunk, ids, places, template.eos_ids if reply.ends else [])


def _apart(comparison: Comparison, template: Template) -> UncutRow:
    """Prompt and replies each on their own, as an encoder and its decoder read them."""
    if comparison.turns is not None:
        raise UserError(
            f"{comparison.source}: a reply of several messages, tool calls or reasoning cannot be written for a model with an "
            "encoder, which reads prompt and reply apart. Take such rows out."
        )
    prompt = template.prompt_ids(comparison.prompt, comparison.tools)
    eos = template.eos_ids
    responses = [
        Response([*ids, *eos], [], len(ids) + len(eos), len(eos))
        for ids in template.texts_ids(comparison.responses)
    ]
    return UncutRow(prompt, [], responses, 0)
