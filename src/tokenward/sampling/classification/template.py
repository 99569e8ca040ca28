"""What the task model reads: the template with its sentence, prompt and mask, and the words of its answers.

The prompt is a list of token ids and stays one: sampled tokens that are turned into text and encoded again may
come back as others, and then the scored prompt is not the sampled one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from tokenward.errors import UserError

SLOTS = ("sentence", "prompt", "mask")
_EXAMPLE = 'Write for example "{sentence} {prompt}", or "{sentence} {prompt} {mask} ." for a masked model.'


class TemplatePart(NamedTuple):
    """A piece of a template: text, or a slot.

    Attributes:
        text: Empty for the sentence and the prompt.
        slot: Its name; None for text.
        spaced: Whether a space stands before it.
    """

    text: str
    slot: str | None
    spaced: bool = False


class FilledTemplate(NamedTuple):
    """A template with its sentence: the ids around the prompt.

    Attributes:
        before: Ids before the prompt.
        after: Ids after it.
        answer: Index in the row of the token that the answer is read at: the mask, or the last token. A negative one
            counts from the end.
        cut: Whether the sentence was cut.
    """

    before: list[int]
    after: list[int]
    answer: int
    cut: bool

    def row(self, prompt: list[int]) -> list[int]:
        """The whole row."""
        return self.before + prompt + self.after


@dataclass(frozen=True)
class PromptTemplate:
    """Text with one ``{sentence}``, one ``{prompt}`` and, for a masked model, one ``{mask}``.

    Without a mask the next token is the answer. Spaces between parts belong to what follows them, as tokenizers
    have it: before a sentence, a mask or a word they are encoded with it, before the prompt they are left out (its
    first token says itself whether it begins with a space), and at the start and the end of the row too. So an
    empty prompt leaves no double space. Special tokens may be written out; in a sentence they are text.

    Attributes:
        text: The template; ``{{`` and ``}}`` stand for braces.

    Raises:
        UserError: a slot is unknown, missing or there twice.
    """

    text: str

    def __post_init__(self) -> None:
        found = [part.slot for part in self.parts if part.slot is not None]
        for slot in found:
            if slot not in SLOTS:
                raise UserError(
                    f"the template {self.text!r} has the slot {{{slot}}}; known are {{sentence}}, {{prompt}} and {{mask}}. "
                    "Double the braces where they are text."
                )
        for slot in SLOTS:
            count = found.count(slot)
            if count > 1 or (count == 0 and slot != "mask"):
                raise UserError(
                    f"the template {self.text!r} has {{{slot}}} {count} times, it must stand there once. {_EXAMPLE}"
                )

    @property
    def parts(self) -> list[TemplatePart]:
        """Its texts and slots in order."""
        try:
            pieces = list(Formatter().parse(self.text))
        except ValueError as error:
            raise UserError(f"the template {self.text!r} cannot be read: {error}. {_EXAMPLE}") from error
        parts: list[TemplatePart] = []
        for text, name, spec, conversion in pieces:
            parts += [TemplatePart(text, None)] if text else []
            if name is not None:
                marks = f":{spec}" if spec else ""
                parts.append(TemplatePart("", name + (f"!{conversion}" if conversion else "") + marks))
        return parts

    @property
    def has_mask(self) -> bool:
        """Whether it is for a masked model."""
        return any(part.slot == "mask" for part in self.parts)

    @property
    def sentence_first(self) -> bool:
        """Whether the sentence comes before the prompt, so that a causal model reads it once for all prompts."""
        slots = [part.slot for part in self.parts]
        return slots.index("sentence") < slots.index("prompt")


class TemplateEncoder:
    """Fills a template with the ids of a tokenizer."""

    def __init__(
        self, template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, *, max_sentence_tokens: int
    ) -> None:
        """Prepare the parts that every row shares.

        Args:
            template: What to fill.
            tokenizer: Of the task model.
            max_sentence_tokens: A longer sentence loses its end; nothing else is ever cut.
        """
        self._tokenizer = tokenizer
        self._max = max_sentence_tokens
        self._opening, closing = special_ends(tokenizer)
        # After a causal model's text comes its answer, not its end.
        self._closing = closing if template.has_mask else []
        self._parts = _spaced(_joined(template.parts, str(tokenizer.mask_token)))

    def fill(self, sentence: str, *, empty_prompt: bool = False) -> FilledTemplate:
        """The ids around a prompt for one sentence, whose outer white space is left out.

        Args:
            sentence: The text to classify.
            empty_prompt: Whether the prompt will be empty, so that the row may begin with what follows it.
        """
        before, after, mask, cut = list(self._opening), list[int](), None, False
        half, begun = before, False
        for part in self._parts:
            if part.slot == "prompt":
                half, begun = after, begun or not empty_prompt
                continue
            space = " " if part.spaced and begun else ""
            if part.slot == "sentence":
                ids = self._encode(space + sentence.strip(), split_special_tokens=True)
                cut, ids = len(ids) > self._max, ids[: self._max]
            else:
                ids = self._encode(space + part.text)
            if part.slot == "mask":
                mask = half, len(half) + ids.index(cast(int, self._tokenizer.mask_token_id))
            half += ids
            begun = True
        after += self._closing
        answer = -1
        if mask is not None:
            answer = mask[1] if mask[0] is before else mask[1] - len(after)
        return FilledTemplate(before, after, answer, cut)

    def _encode(self, text: str, **settings: Any) -> list[int]:
        return _ids(self._tokenizer, text, **settings)


def special_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer itself puts before and after a text."""
    bare = _ids(tokenizer, "a")
    whole = cast(list[int], tokenizer("a")["input_ids"])
    starts = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
    return (whole[: starts[0]], whole[starts[0] + len(bare) :]) if starts else ([], [])


def _joined(parts: list[TemplatePart], mask: str) -> list[TemplatePart]:
    """Text around the mask becomes one part with it: some mask tokens swallow the space on their left."""
    joined: list[TemplatePart] = []
    for part in parts:
        plain = part.slot in (None, "mask")
        text = mask if part.slot == "mask" else part.text
        if plain and joined and joined[-1].slot in (None, "mask"):
            slot = "mask" if "mask" in (part.slot, joined[-1].slot) else None
            joined[-1] = TemplatePart(joined[-1].text + text, slot)
        else:
            joined.append(TemplatePart(text, part.slot))
    return joined


def _spaced(parts: list[TemplatePart]) -> list[TemplatePart]:
    """Each space between two parts moves to the one on its right."""
    spaced: list[TemplatePart] = []
    pending = False
    for text, slot, _ in parts:
        if slot in ("sentence", "prompt"):
            spaced.append(TemplatePart("", slot, pending))
            pending = False
            continue
        core = text.strip(" ")
        if core:
            spaced.append(TemplatePart(core, slot, text.startswith(" ")))
        pending = text.endswith(" ")
    return spaced


def verbalizer_ids(tokenizer: PreTrainedTokenizerBase, verbalizers: Sequence[str]) -> list[int]:
    """The one token of each class's word.

    Args:
        tokenizer: Of the task model.
        verbalizers: One word per class, in the order of the labels; most tokenizers want a space in front, ``" great"``.

    Raises:
        UserError: there are fewer than two, a word is not exactly one known token, or two have the same one.
    """
    if len(verbalizers) < 2:
        raise UserError(
            f"verbalizers: got {list(verbalizers)}, a classifier needs one word for each of 2 or more classes."
        )
    found: dict[int, str] = {}
    for word in verbalizers:
        token = _only_token(tokenizer, word)
        if token in found:
            raise UserError(
                f"verbalizers: {found[token]!r} and {word!r} are the same token, so their classes could not be told apart. "
                "Write another word for one of them."
            )
        found[token] = word
    return list(found)


def _only_token(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    ids = _ids(tokenizer, word)
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return ids[0]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    problem = (
        "is not in the vocabulary" if len(ids) == 1 else f"is {len(ids)} tokens, {tokens}, and must be one"
    )
    spaced = " " + word.strip()
    other = _ids(tokenizer, spaced)
    fits = spaced != word and len(other) == 1 and other[0] != tokenizer.unk_token_id
    advice = f"Write {spaced!r}, with a leading space: that is one token" if fits else "Write another word"
    raise UserError(f"verbalizers: {word!r} {problem}. {advice}.")


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, **settings: Any) -> list[int]:
    return cast(list[int], tokenizer(text, add_special_tokens=False, **settings)["input_ids"])
