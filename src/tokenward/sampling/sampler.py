"""Batched, length-sorted, seeded sampling with transformers' generate."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import GenerationConfig

from tokenward.models.loading import LanguageModel
from tokenward.tokens.template import Template


class SamplingSettings(NamedTuple):
    """How replies are drawn.

    Attributes:
        max_new_tokens: Longest reply, its end-of-turn token included.
        temperature: 0 takes the most likely token each time.
        top_p: Nucleus mass; 1 is off.
        top_k: Most likely tokens to draw from; 0 is off.
        batch: Prompts at once.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch: int = 64


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
    width = max(map(len, prompts))
    pad = model.pad_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = generation_config(template, settings, pad)
    with _without_folder_settings(model):
        rows = model.model.generate(  # type: ignore[operator]
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
        )
    return [_reply(template, row) for row in rows[:, width:].tolist()]


@contextmanager
def _without_folder_settings(model: LanguageModel) -> Iterator[None]:
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


def generation_config(template: Template, settings: SamplingSettings, pad_id: int) -> GenerationConfig:
    """The settings as transformers takes them."""
    greedy = settings.temperature == 0
    drawing = (
        {}
        if greedy
        else {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
    )
    return GenerationConfig(
        do_sample=not greedy,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=template.closing_ids[-1],
        pad_token_id=pad_id,
        **drawing,
    )


def _reply(template: Template, row: list[int]) -> Reply:
    closing = template.closing_ids[-1]
    ended = closing in row
    # Padding follows the end; it may be the same id, so the first end is where the reply stops.
    ids = row[: row.index(closing) + 1] if ended else row
    return Reply(ids, str(template.tokenizer.decode(ids, skip_special_tokens=True)), ended)
