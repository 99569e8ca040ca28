"""What the task model reads: a template filled with sentence, prompt and mask, and the answer words.

The prompt stays a list of token ids: text decoded from sampled tokens may be encoded as other tokens, and then the
scored prompt would not be the sampled one.
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
    """A piece of a template: text (``slot`` is None) or a slot; ``spaced`` if a space precedes it."""

    text: str
    slot: str | None
    spaced: bool = False


class FilledTemplate(NamedTuple):
    """A template with its sentence: the token ids before and after the prompt, and whether the sentence was truncated.

    ``answer`` is the index in the row of the token at which the answer is read (the mask, or the last token), counted from
    the end if negative.
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

    Without a mask the answer is the next token. A space between two parts is encoded with the part after it, as tokenizers
    do, but dropped before the prompt (whose first token may contain it) and at both ends of the row. An empty prompt
    therefore leaves no double space. Special tokens may be written out; in a sentence they are text. ``{{`` and ``}}`` stand
    for braces.

    Raises:
        UserError: a slot is unknown, missing or repeated.
    """

    text: str

    def __post_init__(self) -> None:
        found = [part.slot for part in self.parts if part.slot is not None]
        for slot in found:
            if slot not in SLOTS:
                raise _template_error(
                    f"{self.text!r} has an unknown slot {{{slot}}}. Known are {{sentence}}, {{prompt}} and {{mask}}; double the "
                    "braces to write them as text."
                )
        for slot in SLOTS:
            count = found.count(slot)
            if count > 1 or (count == 0 and slot != "mask"):
                raise _template_error(
                    f"{self.text!r} has {{{slot}}} {count} times, but needs it once. {_EXAMPLE}"
                )

    @property
    def parts(self) -> list[TemplatePart]:
        """Its texts and slots in order."""
        try:
            pieces = list(Formatter().parse(self.text))
        except ValueError as error:
            raise _template_error(f"{self.text!r} cannot be parsed: {error}. {_EXAMPLE}") from error
        parts: list[TemplatePart] = []
        for text, name, spec, conversion in pieces:
            parts += [TemplatePart(text, None)] if text else []
            if name is not None:
                conversion = f"!{conversion}" if conversion else ""
                parts.append(TemplatePart("", name + conversion + (f":{spec}" if spec else "")))
        return parts

    @property
    def has_mask(self) -> bool:
        """Whether it is for a masked model."""
        return any(part.slot == "mask" for part in self.parts)

    @property
    def sentence_first(self) -> bool:
        """Whether the sentence precedes the prompt, so that a causal model can read it once for all prompts."""
        slots = [part.slot for part in self.parts]
        return slots.index("sentence") < slots.index("prompt")


def _template_error(problem: str) -> UserError:
    return UserError(f"the template {problem}", code="invalid-template", key="prompt_task.template")


class TemplateEncoder:
    """Fills a template with token ids; a sentence longer than ``max_sentence_tokens`` is truncated, nothing else is."""

    def __init__(
        self, template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, *, max_sentence_tokens: int
    ) -> None:
        self._tokenizer = tokenizer
        self._max = max_sentence_tokens
        self._opening, closing = special_ends(tokenizer)
        # A causal model's answer comes right after the text, so no end-of-text token may stand there.
        self._closing = closing if template.has_mask else []
        self._parts = _spaced(_joined(template.parts, str(tokenizer.mask_token)))

    def fill(self, sentence: str, *, empty_prompt: bool = False) -> FilledTemplate:
        """The ids around a prompt for one sentence, stripped of outer white space.

        With an empty prompt the row may begin with the part after it, which then loses its space.
        """
        before, after, mask, cut = list(self._opening), list[int](), None, False
        half, begun = before, False
        for part in self._parts:
            if part.slot == "prompt":
                half, begun = after, begun or not empty_prompt
                continue
            space = " " if part.spaced and begun else ""
            if part.slot == "sentence":
                ids = _ids(self._tokenizer, space + sentence.strip(), split_special_tokens=True)
                cut, ids = len(ids) > self._max, ids[: self._max]
            else:
                ids = _ids(self._tokenizer, space + part.text)
            if part.slot == "mask":
                mask = half, len(half) + ids.index(cast(int, self._tokenizer.mask_token_id))
            half += ids
            begun = True
        after += self._closing
        answer = -1
        if mask is not None:
            answer = mask[1] if mask[0] is before else mask[1] - len(after)
        return FilledTemplate(before, after, answer, cut)


def special_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer itself puts before and after a text."""
    bare = _ids(tokenizer, "a")
    whole = cast(list[int], tokenizer("a")["input_ids"])
    starts = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
    return (whole[: starts[0]], whole[starts[0] + len(bare) :]) if starts else ([], [])


def _joined(parts: list[TemplatePart], mask: str) -> list[TemplatePart]:
    """Joins the text around the mask with it, because some mask tokens absorb the space on their left."""
    joined: list[TemplatePart] = []
    for part in parts:
        text = mask if part.slot == "mask" else part.text
        if part.slot in (None, "mask") and joined and joined[-1].slot in (None, "mask"):
            slot = "mask" if "mask" in (part.slot, joined[-1].slot) else None
            joined[-1] = TemplatePart(joined[-1].text + text, slot)
        else:
            joined.append(TemplatePart(text, part.slot))
    return joined


def _spaced(parts: list[TemplatePart]) -> list[TemplatePart]:
    """Moves each space between two parts to the one on its right."""
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
    """The token of each class's word, in the order of the labels.

    Raises:
        UserError: there are fewer than two words, one is not exactly one known token, or two are the same token.
    """
    if len(verbalizers) < 2:
        raise _verbalizer_error(
            f"got {list(verbalizers)}; a classifier needs one word for each of 2 or more classes."
        )
    found: dict[int, str] = {}
    for word in verbalizers:
        token = _only_token(tokenizer, word)
        if token in found:
            raise _verbalizer_error(
                f"{found[token]!r} and {word!r} are the same token, so their classes cannot be told apart. Use another word."
            )
        found[token] = word
    return list(found)


def _only_token(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    def known(ids: list[int]) -> bool:
        return len(ids) == 1 and ids[0] != tokenizer.unk_token_id

    ids, spaced = _ids(tokenizer, word), " " + word.strip()
    if known(ids):
        return ids[0]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    problem = (
        "is not in the vocabulary" if len(ids) == 1 else f"is {len(ids)} tokens, {tokens}, but must be one"
    )
    fits = spaced != word and known(_ids(tokenizer, spaced))
    advice = f"Write {spaced!r} with a leading space, which is one token" if fits else "Use another word"
    raise _verbalizer_error(f"{word!r} {problem}. {advice}.")


def _verbalizer_error(problem: str) -> UserError:
    return UserError(f"verbalizers: {problem}", code="invalid-verbalizer", key="prompt_task.verbalizers")


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, **settings: Any) -> list[int]:
    return cast(list[int], tokenizer(text, add_special_tokens=False, **settings)["input_ids"])
