"""Batched, length-sorted, seeded sampling with transformers' generate, and streaming of one reply."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.streamers import BaseStreamer

from tokenward.distributed import split
from tokenward.errors import UserError
from tokenward.models.loading import LanguageModel
from tokenward.models.sharding import is_sharded, reading
from tokenward.plugins import validated
from tokenward.tokens.template import Template
from tokenward.trl_names import answers_trl

REPEATABLE = (DynamicLayer, DynamicSlidingWindowLayer)
"""Types of cache layers that can be repeated for several replies to one prompt."""


@answers_trl
@dataclass(frozen=True, slots=True)
@validated
class SamplingSettings:
    """How replies are sampled.

    Attributes:
        max_new_tokens: Maximum reply length, including its end-of-turn token.
        temperature: 0 is greedy decoding.
        top_p: Nucleus mass; 1 turns it off.
        top_k: Number of most likely tokens to sample from; 0 turns it off.
        batch: Replies per ``generate`` call.
        stop: Texts that end a reply; they are not part of the reply's text.
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
        ids: Its tokens, including the end-of-turn token if it was reached.
        text: Its text.
        ended: Whether the model ended it; False if the token limit did.
    """

    ids: list[int]
    text: str
    ended: bool


class Sampler(Protocol):
    """Samples replies from the current policy. Implement it to use a faster engine."""

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        count: int,
        seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Reply]]:
        """``count`` replies to each prompt (token ids), in the order of the prompts.

        The same seed, prompts and weights must give the same replies. ``progress`` is called with the number of new replies.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformersSampler:
    """transformers' ``generate`` on the policy itself, so it always uses the current weights.

    ``template`` defines the end of a reply. Precision ``bfloat16`` samples from a copy in that dtype: faster, but slightly
    off-policy. ``shared`` is that of :func:`sample_replies`.
    """

    model: LanguageModel
    template: Template
    settings: SamplingSettings
    precision: Literal["float32", "bfloat16"] = "float32"
    shared: bool = False

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
        model = self.model
        if self.precision == "bfloat16" and model.dtype == torch.float32:
            model = replace(model, model=nn.Module.to(deepcopy(model.model), dtype=torch.bfloat16))  # type: ignore[arg-type]
        settings: dict[str, Any] = {"seed": seed, "progress": progress, "shared": self.shared}
        replies = sample_replies(model, self.template, repeated, self.settings, **settings)
        return [replies[start : start + count] for start in range(0, len(replies), count)]


def sample_replies(
    model: LanguageModel,
    template: Template,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    *,
    seed: int,
    progress: Callable[[int], None] | None = None,
    shared: bool = False,
) -> list[Reply]:
    """One reply to each prompt, in the order of the prompts.

    The same seed, prompts and batch size give the same replies. Two models get the same random numbers, which narrows
    the confidence interval of their difference. The state of torch's generators is restored. ``template`` defines the end
    of a reply, ``progress`` is called with the number of new replies. With ``shared``, every process of a launch calls this with
    the same arguments, and they share the batches; each has random numbers of its own, so the replies are those of one process.
    """
    settings = with_end_of_turn(settings, template)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    replies: dict[int, Reply] = {}
    model.model.eval()
    groups = [order[start : start + settings.batch] for start in range(0, len(order), settings.batch)]

    def batch(number: int) -> list[Reply]:
        torch.manual_seed(_seed_of_batch(seed, number))
        return _sample(model, template, [prompts[index] for index in groups[number]], settings)

    numbers = range(len(groups)) if shared else _calls(model, len(groups))
    with torch.random.fork_rng(), reading(model.model):
        found = split(numbers, batch, at_once=1) if shared else map(batch, numbers)
        for number, sampled in zip(numbers, found, strict=True):
            new = {
                index: reply
                for index, reply in zip(groups[number], sampled, strict=True)
                if index not in replies
            }
            replies |= new
            if progress is not None and new:
                progress(len(new))
    return [replies[index] for index in range(len(prompts))]


def _seed_of_batch(seed: int, number: int) -> int:
    """A seed for each batch, so that a batch has the same random numbers whichever process samples it."""
    # Odd, so that its multiples differ in the low 32 bits, which are all that torch's generator on the CPU reads.
    return (seed + number * 0x9E3779B97F4A7C15) % 2**63


def _calls(model: LanguageModel, batches: int) -> Sequence[int]:
    """The batches in the order in which the model is called.

    If the processes of a training hold parts of the model, all of them must call it equally often: one with fewer batches repeats
    its last one, whose new replies are not used.
    """
    if not is_sharded(model.model):
        return range(batches)
    most = torch.tensor(batches, device=model.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return [*range(batches), *[batches - 1] * (int(most) - batches)]


def with_end_of_turn(settings: SamplingSettings, template: Template) -> SamplingSettings:
    """The settings with the template's end of turn as a stop text, if it is no token of its own."""
    if template.ending.special or settings.fixed_length:
        return settings
    return replace(settings, stop=(*settings.stop, template.ending.turn.strip()))


def _sample(
    model: LanguageModel, template: Template, prompts: Sequence[Sequence[int]], settings: SamplingSettings
) -> list[Reply]:
    ids, mask = _padded(model, prompts)
    # generate returns the prompt too, or the decoder's start token if the model has an encoder.
    before = ids.shape[1] if model.start_id is None else 1
    config = generation_config(model, template, settings)
    extra: dict[str, Any] = {}
    if settings.stop and not settings.fixed_length:
        extra["stopping_criteria"] = StoppingCriteriaList([_StopTexts(template, settings.stop, before)])
    prefix = _shared_prefix(model, prompts)
    if prefix is not None:
        extra["past_key_values"] = prefix
    ends, watch = ends_of(model, template), _Finite()
    with without_folder_settings(model):
        rows = model.model.generate(  # type: ignore[operator]
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            synced_gpus=is_sharded(model.model),
            logits_processor=LogitsProcessorList([watch]),
            **extra,
        )
    watch.check(model.name)
    return [reply_of(template, row, settings, ends) for row in rows[:, before:].tolist()]


def ends_of(model: LanguageModel, template: Template) -> list[int]:
    """Tokens that end a reply: the template's end of turn, and the eos tokens of the model's generation config."""
    holder = model.model.get_base_model() if isinstance(model.model, PeftModel) else model.model
    named: Any = holder.generation_config.eos_token_id  # type: ignore[union-attr]
    others = [] if named is None else [named] if isinstance(named, int) else list(named)
    return list(dict.fromkeys([template.eos_ids[-1], *others]))


def _shared_prefix(model: LanguageModel, prompts: Sequence[Sequence[int]]) -> DynamicCache | None:
    """Keys and values of each distinct prompt except its last token, repeated for its replies.

    So a prompt with several replies is read only once. None if all prompts differ, or if the model uses another kind of
    cache.
    """
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    width = max(map(len, distinct))
    if model.start_id is not None or len(distinct) == len(prompts) or width < 2 or is_sharded(model.model):
        return None
    ids, mask = (part[:, :-1].to(model.device) for part in _padded(model, distinct))
    places = (mask.cumsum(-1) - 1).clamp(min=0)  # the positions that generate uses for left padding
    output = model.model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True)
    cache = output.get("past_key_values")
    # The state of a recurrent layer cannot be repeated this way.
    if type(cache) is not DynamicCache or not all(type(layer) in REPEATABLE for layer in cache.layers):
        return None
    number = {prompt: index for index, prompt in enumerate(distinct)}
    cache.batch_select_indices(torch.tensor([number[tuple(p)] for p in prompts], device=model.device))
    return cache


def _padded(model: LanguageModel, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Prompts and their mask. A decoder continues on the right, so it is padded on the left; an encoder on the right."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), model.pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), None) if model.start_id is None else slice(len(prompt))
        ids[row, place], mask[row, place] = torch.tensor(prompt, dtype=torch.long), 1
    return ids, mask


@contextmanager
def without_folder_settings(model: LanguageModel) -> Iterator[None]:
    """A context in which the model has no generation config of its own.

    transformers fills every field that a call leaves unset from the folder's generation_config.json, so a repetition
    penalty in it would change the replies, even with greedy decoding.
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
    """The settings for transformers, except the stop texts."""
    greedy = settings.temperature == 0
    more: dict[str, Any] = {}
    if not greedy:  # transformers warns about sampling settings in greedy decoding
        more |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
    if settings.fixed_length:
        rows = model.model.config.get_text_config().vocab_size  # may exceed the tokenizer's vocabulary
        more["suppress_tokens"] = sorted(template.special_ids | set(range(len(template.tokenizer), rows)))
    else:
        more["eos_token_id"] = ends_of(model, template)
    return GenerationConfig(
        do_sample=not greedy,
        max_new_tokens=settings.max_new_tokens,
        pad_token_id=model.pad_id,
        decoder_start_token_id=model.start_id,
        **more,
    )


class _Finite(LogitsProcessor):
    """Notes rows without finite probabilities, from which torch cannot sample, and which greedy decoding would not notice.

    Such a row goes on with even probabilities, so that a GPU need not wait at each token; :meth:`check` refuses the replies.
    """

    def __init__(self) -> None:
        self._broken: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        # Tokens that are not allowed have -inf. The largest is NaN if there is one.
        finite = scores.amax(-1, keepdim=True).isfinite()
        self._broken = ~finite if self._broken is None else self._broken | ~finite
        return torch.where(finite, scores, 0.0)

    def check(self, name: str) -> None:
        if self._broken is not None and (count := int(self._broken.sum())):
            raise UserError(
                f"{name} gives no finite probabilities for the next token of {count} of {len(self._broken)} replies. A training that diverged "
                "leaves such a model: use an earlier one. If its weights are finite, a product overflows in its number type: sample in "
                "float32.",
                code="non-finite-probabilities",
            )


class _StopTexts(StoppingCriteria):
    """Stops each reply that contains a stop text. transformers' ``stop_strings`` would also match across the prompt's end."""

    def __init__(self, template: Template, stops: Sequence[str], before: int) -> None:
        self._template, self._stops, self._before = template, stops, before

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        texts = self._template.tokenizer.batch_decode(input_ids[:, self._before :], skip_special_tokens=True)
        done = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def reply_of(template: Template, row: list[int], settings: SamplingSettings, ends: Sequence[int]) -> Reply:
    """The reply in sampled tokens: up to the first token that ends it, or that completes a stop text."""
    if settings.fixed_length:
        return Reply(row, str(template.tokenizer.decode(row)), False)
    # The end is followed by padding, which may be the same token, so the first one counts.
    end = next((place for place, token in enumerate(row) if token in ends), None)
    ids = row if end is None else row[: end + 1]
    stopped = _stopped(template, ids, settings.stop)
    if stopped is not None:
        return stopped
    # Decode without the end, because an eos token of the generation config need not be a special token.
    return Reply(ids, str(template.tokenizer.decode(row[:end], skip_special_tokens=True)), end is not None)


def _stopped(template: Template, ids: list[int], stops: Sequence[str]) -> Reply | None:
    """The reply up to the token that completes the first stop text, without that text; None if there is none."""
    for length in range(1, len(ids) + 1) if stops else ():
        text = str(template.tokenizer.decode(ids[:length], skip_special_tokens=True))
        found = [text.index(stop) for stop in stops if stop in text]
        if found:
            return Reply(ids[:length], text[: min(found)], True)
    return None


class _Pieces(BaseStreamer):
    """Collects ids and shows the text so far, except an incomplete character, which may take several tokens."""

    def __init__(self, template: Template, show: Callable[[str], None]) -> None:
        self._template, self._show = template, show
        self._prompt_is_next = True
        self.ids: list[int] = []
        self._shown = 0

    def put(self, value: Tensor) -> None:
        if self._prompt_is_next:  # the first call brings the prompt
            self._prompt_is_next = False
            return
        self.ids += value.flatten().tolist()
        text = self.text
        if not text.endswith("\ufffd"):  # the replacement character stands for an incomplete one
            self._flush(text)

    def end(self) -> None:
        self._flush(self.text)

    @property
    def text(self) -> str:
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
    """One reply; ``show`` is called with each new piece of text. Ctrl-C ends it and keeps what there is.

    ``settings.stop`` and ``settings.batch`` are not used. The state of torch's generators is restored.
    """
    pieces, watch = _Pieces(template, show), _Finite()
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
                logits_processor=LogitsProcessorList([watch]),
                streamer=pieces,
            )
        except KeyboardInterrupt:
            pieces.end()
    watch.check(model.name)
    ended = any(token in ends for token in pieces.ids)
    return Reply(pieces.ids, pieces.text, ended)
