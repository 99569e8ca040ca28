"""Batched, length-sorted, seeded sampling with transformers' generate, and one reply streamed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.streamers import BaseStreamer

from tokenward.models.loading import LanguageModel
from tokenward.tokens.template import Template

REPEATED = (DynamicLayer, DynamicSlidingWindowLayer)
"""Kinds of a cache's layers that can be repeated, one for each reply to a prompt."""


class SamplingSettings(NamedTuple):
    """How replies are drawn.

    Attributes:
        max_new_tokens: Longest reply, its end-of-turn token included.
        temperature: 0 takes the most likely token each time.
        top_p: Nucleus mass; 1 is off.
        top_k: Most likely tokens to draw from; 0 is off.
        batch: Replies at once.
        stop: Texts after which a reply is over; the reply's text is cut before them.
        fixed_length: Nothing ends a reply: each has exactly ``max_new_tokens`` tokens, none of them special.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch: int = 64
    stop: tuple[str, ...] = ()
    fixed_length: bool = False


class Reply(NamedTuple):
    """One sampled reply.

    Attributes:
        ids: Its tokens, the end-of-turn token included where it was reached.
        text: Its text.
        ended: Whether the model ended it, or the token limit did.
    """

    ids: list[int]
    text: str
    ended: bool


class Sampler(Protocol):
    """Draws K replies to each prompt from the policy as it is now; a faster engine can stand here."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        count: int,
        seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Reply]]:
        """``count`` replies to each prompt, in the prompts' order.

        Args:
            prompts: Token ids.
            count: Replies to each.
            seed: Of everything random; the same seed, prompts and weights give the same replies.
            progress: Called with the number of replies done.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformersSampler:
    """Transformers' ``generate`` on the policy itself: it always draws from the weights of the moment.

    Attributes:
        model: The policy.
        template: Says what ends a reply.
        settings: How to draw.
        precision: ``bfloat16`` draws from a copy in that number type: faster, and a little beside the policy.
    """

    model: LanguageModel
    template: Template
    settings: SamplingSettings
    precision: Literal["float32", "bfloat16"] = "float32"

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        count: int,
        seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Reply]]:
        """See :class:`Sampler`."""
        repeated = [prompt for prompt in prompts for _ in range(count)]
        coarse = self.precision == "bfloat16" and self.model.dtype == torch.float32
        model = _coarse_copy(self.model) if coarse else self.model
        replies = sample_replies(model, self.template, repeated, self.settings, seed=seed, progress=progress)
        return [replies[start : start + count] for start in range(0, len(replies), count)]


def _coarse_copy(model: LanguageModel) -> LanguageModel:
    return replace(model, model=nn.Module.to(deepcopy(model.model), dtype=torch.bfloat16))  # type: ignore[arg-type]


def sample_replies(
    model: LanguageModel,
    template: Template,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    *,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> list[Reply]:
    """One reply to each prompt, in the prompts' order.

    The same seed, prompts and batch size give the same replies; two models see the same random
    numbers, which narrows the interval of their difference.

    Args:
        model: The policy.
        template: Says what ends a reply.
        prompts: Token ids.
        settings: How to draw.
        seed: Of torch's generators, which are left as they were.
        progress: Called with the number of prompts done.
    """
    if not template.ending.special and not settings.fixed_length:
        settings = settings._replace(stop=(*settings.stop, template.ending.turn.strip()))
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    replies: list[Reply | None] = [None] * len(prompts)
    model.model.eval()
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        for start in range(0, len(order), settings.batch):
            group = order[start : start + settings.batch]
            for index, reply in zip(
                group, _sample(model, template, [prompts[i] for i in group], settings), strict=True
            ):
                replies[index] = reply
            if progress is not None:
                progress(len(group))
    return [reply for reply in replies if reply is not None]


def _sample(
    model: LanguageModel, template: Template, prompts: Sequence[Sequence[int]], settings: SamplingSettings
) -> list[Reply]:
    ids, mask = _padded(model, prompts)
    # What comes back begins with the prompt, or with the decoder's start where the model has an encoder.
    before = ids.shape[1] if model.start_id is None else 1
    config = generation_config(model, template, settings)
    extra: dict[str, Any] = {}
    if settings.stop and not settings.fixed_length:
        extra["stopping_criteria"] = StoppingCriteriaList([_StopTexts(template, settings.stop, before)])
    prefix = _shared_prefix(model, prompts)
    if prefix is not None:
        extra["past_key_values"] = prefix
    ends = ends_of(model, template)
    with without_folder_settings(model):
        rows = model.model.generate(  # type: ignore[operator]
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            **extra,
        )
    return [_reply(template, row, settings, ends) for row in rows[:, before:].tolist()]


def ends_of(model: LanguageModel, template: Template) -> list[int]:
    """Tokens that end a reply: the template's end of turn, and whatever the model's folder names beside it."""
    holder = model.model.get_base_model() if isinstance(model.model, PeftModel) else model.model
    named: Any = holder.generation_config.eos_token_id  # type: ignore[union-attr]
    others = [] if named is None else [named] if isinstance(named, int) else list(named)
    return list(dict.fromkeys([template.eos_ids[-1], *others]))


def _shared_prefix(model: LanguageModel, prompts: Sequence[Sequence[int]]) -> DynamicCache | None:
    """Keys and values of each distinct prompt but its last token, repeated for its replies.

    Several replies to one prompt need it read only once. None where no prompt comes twice, or the model keeps
    another kind of cache.
    """
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    width = max(map(len, distinct))
    if model.start_id is not None or len(distinct) == len(prompts) or width < 2:
        return None
    ids, mask = (part[:, :-1].to(model.device) for part in _padded(model, distinct))
    places = (mask.cumsum(-1) - 1).clamp(min=0)  # as generate counts them
    output = model.model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True)
    cache = output.get("past_key_values")
    # A recurrent layer keeps a state, which cannot be repeated so.
    if type(cache) is not DynamicCache or not all(type(layer) in REPEATED for layer in cache.layers):
        return None
    number = {prompt: index for index, prompt in enumerate(distinct)}
    cache.batch_select_indices(torch.tensor([number[tuple(p)] for p in prompts], device=model.device))
    return cache


def _padded(model: LanguageModel, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Prompts and their mask: padded on the left for a decoder, which goes on at the right, else on the right."""
    width = max(map(len, prompts))
    ids, mask = [], []
    for prompt in prompts:
        fill, real = [model.pad_id] * (width - len(prompt)), [1] * len(prompt)
        none = [0] * len(fill)
        ids.append([*fill, *prompt] if model.start_id is None else [*prompt, *fill])
        mask.append([*none, *real] if model.start_id is None else [*real, *none])
    return torch.tensor(ids), torch.tensor(mask)


@contextmanager
def without_folder_settings(model: LanguageModel) -> Iterator[None]:
    """While open, the model has no generation settings of its own.

    transformers fills every field that a call leaves open from the folder's generation_config.json, so a
    repetition penalty in it would change what is drawn, even by greedy decoding.
    """
    holders = [model.model, *([model.model.get_base_model()] if isinstance(model.model, PeftModel) else [])]
    before = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = GenerationConfig()
        yield
    finally:
        for holder, settings in zip(holders, before, strict=True):
            holder.generation_config = settings


def generation_config(
    model: LanguageModel, template: Template, settings: SamplingSettings
) -> GenerationConfig:
    """The settings as transformers takes them, but for the stop texts."""
    greedy = settings.temperature == 0
    drawing = (
        {}
        if greedy
        else {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
    )
    ending = (
        {"suppress_tokens": _no_text(model, template)}
        if settings.fixed_length
        else {"eos_token_id": ends_of(model, template)}
    )
    return GenerationConfig(
        do_sample=not greedy,
        max_new_tokens=settings.max_new_tokens,
        pad_token_id=model.pad_id,
        decoder_start_token_id=model.start_id,
        **ending,
        **drawing,
    )


def _no_text(model: LanguageModel, template: Template) -> list[int]:
    """Special tokens, and rows of the model beyond its tokenizer's vocabulary."""
    rows = model.model.config.get_text_config().vocab_size
    return sorted(template.special_ids | set(range(len(template.tokenizer), rows)))


class _StopTexts(StoppingCriteria):
    """EosSides each reply that holds a stop text; the prompt's own text, which transformers' stop_strings sees, is not read."""

    def __init__(self, template: Template, stops: Sequence[str], before: int) -> None:
        self._template, self._stops, self._before = template, stops, before

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        texts = self._template.tokenizer.batch_decode(input_ids[:, self._before :], skip_special_tokens=True)
        done = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def _reply(template: Template, row: list[int], settings: SamplingSettings, ends: Sequence[int]) -> Reply:
    if settings.fixed_length:
        return Reply(row, str(template.tokenizer.decode(row)), False)
    # Padding follows the end; it may be the same id, so the first end is where the reply stops.
    end = next((place for place, token in enumerate(row) if token in ends), None)
    ended = end is not None
    ids = row if end is None else row[: end + 1]
    stopped = _stopped(template, ids, settings.stop)
    if stopped is not None:
        return stopped
    # A folder may name an end that is no special token.
    return Reply(ids, str(template.tokenizer.decode(row[:end], skip_special_tokens=True)), ended)


def _stopped(template: Template, ids: list[int], stops: Sequence[str]) -> Reply | None:
    """The reply up to the token that completed the first stop text, without that text; None if there is none."""
    if not stops:
        return None
    for length in range(1, len(ids) + 1):
        text = str(template.tokenizer.decode(ids[:length], skip_special_tokens=True))
        found = [text.index(stop) for stop in stops if stop in text]
        if found:
            return Reply(ids[:length], text[: min(found)], True)
    return None


class _Pieces(BaseStreamer):
    """Collects ids and shows the text that is certain: a character may take several tokens."""

    def __init__(self, template: Template, show: Callable[[str], None]) -> None:
        self._template, self._show = template, show
        self._prompt_is_next = True
        self.ids: list[int] = []
        self._shown = 0

    def put(self, value: Tensor) -> None:
        """Ids as generate draws them; the first call brings the prompt."""
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self.ids += value.flatten().tolist()
        text = self.text
        if not text.endswith("\ufffd"):
            self._flush(text)

    def end(self) -> None:
        """Nothing more will come."""
        self._flush(self.text)

    @property
    def text(self) -> str:
        """The reply so far."""
        return str(self._template.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _flush(self, text: str) -> None:
        self._show(text[self._shown :])
        self._shown = len(text)


def stream_reply(
    model: LanguageModel,
    template: Template,
    prompt: Sequence[int],
    settings: SamplingSettings,
    *,
    seed: int,
    show: Callable[[str], None],
) -> Reply:
    """One reply; Ctrl-C ends it and what was drawn is kept.

    Args:
        model: Draws it.
        template: Says what ends it.
        prompt: Token ids.
        settings: How to draw; ``stop`` and ``batch`` are not looked at.
        seed: Of torch's generators, which are left as they were.
        show: Called with each new piece of text.
    """
    pieces = _Pieces(template, show)
    ids = torch.tensor([list(prompt)], device=model.device)
    model.model.eval()
    config, ends = generation_config(model, template, settings), ends_of(model, template)
    with torch.random.fork_rng(), torch.inference_mode(), without_folder_settings(model):
        torch.manual_seed(seed)
        try:
            model.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                streamer=pieces,
            )
        except KeyboardInterrupt:
            pieces.end()
    ended = any(token in ends for token in pieces.ids)
    return Reply(pieces.ids, pieces.text, ended)
