"""Splits the tokens of a conversation into those of the prompt, those of the assistant, and what is between them.

The whole conversation is encoded as the template writes it, and split where prompt and replies meet. If one token would
cover both, or if a reply spells a mark of the template, the reply is encoded separately, and a note is set.
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
    is_continuable,
    left_out_of_prompt,
    left_out_of_reply,
    texts_of,
    write_prompt,
    write_reply,
)
from tokenward.types import Comparison, Message


class Note(IntFlag):
    """What is unusual about a comparison's rows. Encoded stores contain these numbers."""

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
    ROLES_LEFT_OUT = 4096


SAID: dict[Note, str] = {
    Note.APART: "note: prompt and reply are encoded apart, as in generation",
    Note.OPENING: "note: replies begin differently from the generation prompt",
    Note.PRELUDE: "note: the template writes text before a reply",
    Note.REPLY_MARKS: "note: a reply contains marks of the template or special tokens",
    Note.PROMPT_MARKS: "note: the prompt contains marks of the template",
    Note.REPLY_LEFT_OUT: "note: the template leaves out part of a reply",
    Note.PROMPT_LEFT_OUT: "note: the template leaves out part of the prompt",
    Note.ROLES_LEFT_OUT: "note: plain text does not say whose each message of the prompt is",
}
"""Notes of rows that are kept."""

DROPPED: dict[Note, str] = {
    Note.UNPLACED: "dropped: the template does not write the messages of a reply in order",
    Note.UNWRITTEN: "dropped: the template does not write a reply",
    Note.WEIGHTLESS: "dropped: all messages of a reply have weight 0",
    Note.BEGUN: "dropped: no reply can continue the prompt, which ends with a call or with reasoning",
    Note.CUT_AWAY: "dropped: nothing of a response is left after truncation",
}
"""Notes of rows that are dropped."""


class Insert(NamedTuple):
    """Tokens inside a response that are not the assistant's: the model reads them, but they have no values."""

    before: int  # position of the response's token that follows them
    ids: list[int]  # their ids


class Response(NamedTuple):
    """A response as ids."""

    ids: list[int]  # tokens of the assistant, with the eos tokens
    context: list[Insert]  # tokens between them that are not the assistant's
    length: int  # number of tokens before truncation, without those that the template writes before the reply
    eos: int  # number of eos tokens at the end
    notes: int = 0  # see Note

    @property
    def prelude(self) -> int:
        """Number of tokens that are read before the first token of the assistant."""
        return sum(len(insert.ids) for insert in self.context if not insert.before)

    def cut(self, limit: int) -> "Response":
        """The first ``limit`` tokens, shortened to end with a token of the assistant."""
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


class RowIds(NamedTuple):
    """A comparison as ids."""

    prompt: list[int]  # the common first ids of the rows of all replies, as far as they are the prompt
    prompt_length: int  # length of the prompt before truncation
    opening: list[int]  # ids that follow the prompt for generation; usually empty
    responses: list[
        Response
    ]  # in the order of the comparison. A response without tokens has a note that tells why
    notes: int  # notes on the prompt; see Note


class _Tokens(NamedTuple):
    """A text as ids, with the first and last (exclusive) character of each.

    Tokens that the tokenizer adds before the text have the range 0 to 0.
    """

    text: str
    ids: list[int]
    starts: list[int]
    ends: list[int]

    def covering(self, character: int) -> int:
        """The token that covers a character, or the next one if a normalizer removed the character."""
        return bisect_right(self.ends, character)

    def behind(self, character: int) -> int:
        """The first token that begins at or after a character."""
        return bisect_left(self.starts, character)


def split_all(comparisons: Sequence[Comparison], template: Template) -> list[RowIds]:
    """Comparisons as ids. Many at once are much faster than one by one.

    Raises:
        UserError: The template refuses a conversation.
    """
    if template.encoder:
        return [_separately(comparison, template) for comparison in comparisons]
    prompts = [write_prompt(template, comparison) for comparison in comparisons]
    written = [_written(template, *both) for both in zip(comparisons, prompts, strict=True)]
    texts = [
        *(prompt.text for prompt in prompts),
        *(reply.text for found in written for reply in found if reply),
    ]
    tokens = iter(
        _with_first(template, text, [(0, item)])
        for text, item in zip(texts, template.encodings(texts), strict=True)
    )
    prompt_tokens = [next(tokens) for _ in prompts]
    splits = []
    for comparison, prompt, found in zip(comparisons, prompt_tokens, written, strict=True):
        replies = []
        for reply in found:
            own = next(tokens) if reply else None
            own = _unmarked(template, reply) if reply and reply.hidden is not None else own
            replies.append((reply, own) if reply and own else None)
        splits.append(_split(template, comparison, prompt, replies))
    return splits


def _with_first(template: Template, text: str, encodings: Sequence[tuple[int, Encoding]]) -> _Tokens:
    """The tokens of a text from those of its pieces, each with the position of the piece."""
    first = len(template.first_ids)
    ids, starts, ends = list(template.first_ids), [0] * first, [0] * first
    for place, encoding in encodings:
        ids += encoding.ids
        starts += [place + start for start, _ in encoding.offsets]
        ends += [place + end for _, end in encoding.offsets]
    return _Tokens(text, ids, starts, ends)


def _unmarked(template: Template, written: ConversationText) -> _Tokens:
    """The tokens of a conversation in which marks that a reply spells are text, and the template's own are marks."""
    encodings: list[tuple[int, Encoding]] = []
    place, hidden = 0, written.hidden or written.text
    for mark in [*template.special_marks.finditer(hidden), None]:
        end = len(hidden) if mark is None else mark.start()
        pieces = [(written.text[place:end], False)] if end > place else []
        pieces += [] if mark is None else [(mark.group(), True)]
        for text, special in pieces:
            encodings += [(place, encoding) for encoding in template.encodings([text], special=special)]
            place += len(text)
    return _with_first(template, written.text, encodings)


def _split(
    template: Template,
    comparison: Comparison,
    prompt: _Tokens,
    replies: Sequence[tuple[ConversationText, _Tokens] | None],
) -> RowIds:
    """Rows follow the whole conversations: the prompt is the part of the prompt that all of them begin with."""
    # A plain prompt is text like its reply, so it keeps all its tokens.
    followed = [reply[1].ids for reply in replies if reply and template.kind == "chat"]
    trunk = min((_same(prompt.ids, ids) for ids in followed), default=len(prompt.ids))
    notes = int(Note.OPENING) if trunk < len(prompt.ids) else 0
    if template.kind == "chat" and marks_in(template, comparison.prompt):
        notes |= Note.PROMPT_MARKS
    if left_out_of_prompt(comparison, prompt.text):
        notes |= Note.PROMPT_LEFT_OUT
    if template.kind == "plain" and len({message["role"] for message in comparison.prompt} - {"system"}) > 1:
        notes |= Note.ROLES_LEFT_OUT
    if not is_continuable(comparison):
        notes |= Note.BEGUN
    responses = [
        _response(template, prompt, trunk, *reply, messages=comparison.reply(place))
        if reply
        else Response([], [], 0, 0, Note.UNPLACED)
        for place, reply in enumerate(replies)
    ]
    return RowIds(prompt.ids[:trunk], trunk, prompt.ids[trunk:], responses, notes)


def _same(ids: Sequence[int], others: Sequence[int]) -> int:
    """Number of common first ids."""
    if ids == others[: len(ids)]:
        return len(ids)
    pairs = enumerate(zip(ids, others, strict=False))
    return next((place for place, (one, other) in pairs if one != other), len(others))


def _written(template: Template, comparison: Comparison, prompt: PromptText) -> list[ConversationText | None]:
    """The replies of a comparison; None for one that cannot be located."""
    found: list[ConversationText | None] = []
    for place in range(len(comparison.responses)):
        try:
            found.append(write_reply(template, comparison, place, prompt))
        except Unplaced:
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
    if not reply.own:
        return Response([], [], 0, 0, Note.WEIGHTLESS)
    notes = int(Note.REPLY_MARKS) if marks_in(template, messages) else 0
    if prompt.ids[:trunk] != tokens.ids[:trunk]:
        notes |= Note.APART
        own = _by_pieces(template, prompt, trunk, reply)
    else:
        # Tokens of the generation prompt are not the reply's, even if the rows of other replies begin with fewer of them.
        asked = _same(prompt.ids, tokens.ids) if template.kind == "chat" else trunk
        own = _together(template, (trunk, asked), reply, tokens)
    if template.kind == "chat" and left_out_of_reply(messages, reply.text[reply.own[0][0] :]):
        notes |= Note.REPLY_LEFT_OUT
    if len(own.ids) == own.eos:
        notes |= Note.UNWRITTEN
    return own._replace(notes=own.notes | notes) if notes else own


def marks_in(template: Template, messages: Sequence[Message]) -> list[str]:
    """Marks of the template that the texts of some messages contain."""
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
    """A response from the tokens of the whole conversation. ``begun`` are the lengths of the trunk and of the prompt."""
    ids = tokens.ids
    places = [
        (tokens.covering(start), len(ids) if end is None else tokens.behind(end)) for start, end in reply.own
    ]
    start, end = places[-1]
    eos: list[int] = []
    if reply.own[-1][1] is None:
        end, eos = _special_at_end(template, ids, start)
    elif reply.ends:
        text = tokens.behind(len(reply.text.rstrip("\n")))
        eos = eos_ids(template, ids[end:], ids[end:text])
    return _assembled(*begun, ids, [*places[:-1], (start, end)], eos)


def _assembled(
    trunk: int, asked: int, ids: Sequence[int], places: Sequence[tuple[int, int]], eos: Sequence[int]
) -> Response:
    """A response from the ranges of its own tokens in the whole conversation; none begins before ``asked``."""
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
    return made._replace(notes=Note.PRELUDE) if context and made.prelude else made


def eos_ids(template: Template, behind: Sequence[int], text: Sequence[int]) -> list[int]:
    """The tokens that end a reply.

    Args:
        template: Template that wrote the reply.
        behind: All tokens after the reply's text.
        text: Those of them before the last line breaks.
    """
    count = template.ends_after(behind)
    if count:
        return list(behind[:count])
    return [*([] if _is_blank(template, text) else text), template.ending.ids[-1]]


def _special_at_end(template: Template, ids: Sequence[int], start: int) -> tuple[int, list[int]]:
    """Where the text of a conversation's last message ends, and the special tokens after it."""
    last = len(ids)
    while last > start and ids[last - 1] not in template.special_ids and _is_blank(template, [ids[last - 1]]):
        last -= 1
    first = last
    while first > start and ids[first - 1] in template.special_ids:
        first -= 1
    return first, list(ids[first:last]) or [template.ending.ids[-1]]


def _is_blank(template: Template, ids: Sequence[int]) -> bool:
    return not ids or not str(template.tokenizer.decode(list(ids))).strip()


def _by_pieces(template: Template, prompt: _Tokens, trunk: int, reply: ConversationText) -> Response:
    """A plain response whose texts are encoded separately from what is around them."""
    ids, places, reached = prompt.ids[:trunk], list[tuple[int, int]](), len(prompt.text)
    for start, end in reply.own:
        ids += template.written_ids(reply.text[reached:start])
        reached = len(reply.text) if end is None else end
        begin = len(ids)
        ids += template.written_ids(reply.text[start:reached])
        places.append((begin, len(ids)))
    return _assembled(trunk, trunk, ids, places, template.eos_ids if reply.ends else [])


def _separately(comparison: Comparison, template: Template) -> RowIds:
    """Prompt and replies on their own, as an encoder and its decoder read them."""
    if comparison.turns is not None:
        raise UserError(
            f"{comparison.source}: a model with an encoder reads prompt and reply separately, so a reply of several messages, "
            "tool calls or reasoning cannot be written. Remove such rows.",
            code="unsupported-reply",
        )
    prompt = template.prompt_ids(comparison.prompt, comparison.tools)
    eos = template.eos_ids
    responses = [
        Response([*ids, *eos], [], len(ids) + len(eos), len(eos))
        for ids in template.texts_ids(comparison.responses)
    ]
    return RowIds(prompt, len(prompt), [], responses, 0)
