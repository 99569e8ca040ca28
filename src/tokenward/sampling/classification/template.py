"""Where sentence, prompt and mask stand in what the task model reads.

The prompt is a list of token ids and stays one: sampled tokens that are turned into text and encoded again may
come back as others, and then the scored prompt is not the sampled one.
"""

from dataclasses import dataclass
from string import Formatter
from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from tokenward.errors import UserError

SLOTS = ("sentence", "prompt", "mask")
_EXAMPLE = 'Write for example "{sentence} {prompt}", or "{sentence} {prompt} {mask} ." for a masked model.'


class Part(NamedTuple):
    """A piece of a template: text, or a slot."""

    text: str
    slot: str | None


class Sides(NamedTuple):
    """The ids around a prompt.

    Attributes:
        before: Ids before the prompt.
        after: Ids after it.
        mask: Place of the mask token, counted from the start of its side; None without one.
        mask_before: Whether that is the side before the prompt.
        cut: Whether the sentence was cut.
    """

    before: list[int]
    after: list[int]
    mask: int | None
    mask_before: bool
    cut: bool

    def row(self, prompt: list[int]) -> list[int]:
        """The whole row."""
        return self.before + prompt + self.after

    def mask_place(self, prompt: list[int]) -> int | None:
        """Where the mask stands in the whole row."""
        if self.mask is None or self.mask_before:
            return self.mask
        return len(self.before) + len(prompt) + self.mask


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
    def parts(self) -> list[Part]:
        """Its texts and slots in order."""
        try:
            pieces = list(Formatter().parse(self.text))
        except ValueError as error:
            raise UserError(f"the template {self.text!r} cannot be read: {error}. {_EXAMPLE}") from error
        parts: list[Part] = []
        for text, name, spec, conversion in pieces:
            parts += [Part(text, None)] if text else []
            if name is not None:
                marks = f":{spec}" if spec else ""
                parts.append(Part("", name + (f"!{conversion}" if conversion else "") + marks))
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

    def sides(self, sentence: str, *, empty_prompt: bool = False) -> Sides:
        """The ids around a prompt for one sentence, whose outer white space is left out.

        Args:
            sentence: The text to classify.
            empty_prompt: Whether the prompt will be empty, so that the row may begin with what follows it.
        """
        halves: tuple[list[int], list[int]] = (list(self._opening), [])
        half, mask, cut, begun = 0, None, False, False
        for part in self._parts:
            if part.slot == "prompt":
                half, begun = 1, begun or not empty_prompt
                continue
            space = " " if part.spaced and begun else ""
            if part.slot == "sentence":
                ids = self._encode(space + sentence.strip(), split_special_tokens=True)
                cut, ids = len(ids) > self._max, ids[: self._max]
            else:
                ids = self._encode(space + part.text)
            if part.slot == "mask":
                mask = (len(halves[half]) + ids.index(cast(int, self._tokenizer.mask_token_id)), half == 0)
            halves[half].extend(ids)
            begun = True
        place, before = mask if mask is not None else (None, False)
        return Sides(halves[0], halves[1] + self._closing, place, before, cut)

    def _encode(self, text: str, **settings: Any) -> list[int]:
        return cast(list[int], self._tokenizer(text, add_special_tokens=False, **settings)["input_ids"])


def special_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer itself puts before and after a text."""
    bare = cast(list[int], tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = cast(list[int], tokenizer("a")["input_ids"])
    starts = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
    return (whole[: starts[0]], whole[starts[0] + len(bare) :]) if starts else ([], [])


class _Spaced(NamedTuple):
    text: str
    slot: str | None
    spaced: bool


def _joined(parts: list[Part], mask: str) -> list[Part]:
    """Text around the mask becomes one part with it: some mask tokens swallow the space on their left."""
    joined: list[Part] = []
    for part in parts:
        plain = part.slot in (None, "mask")
        text = mask if part.slot == "mask" else part.text
        if plain and joined and joined[-1].slot in (None, "mask"):
            slot = "mask" if "mask" in (part.slot, joined[-1].slot) else None
            joined[-1] = Part(joined[-1].text + text, slot)
        else:
            joined.append(Part(text, part.slot))
    return joined


def _spaced(parts: list[Part]) -> list[_Spaced]:
    """Each space between two parts moves to the one on its right."""
    spaced: list[_Spaced] = []
    pending = False
    for text, slot in parts:
        if slot in ("sentence", "prompt"):
            spaced.append(_Spaced("", slot, pending))
            pending = False
            continue
        core = text.strip(" ")
        if core:
            spaced.append(_Spaced(core, slot, text.startswith(" ")))
        pending = text.endswith(" ")
    return spaced
