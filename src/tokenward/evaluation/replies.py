"""A model's own replies to held-out prompts, and how far it has gone from another where it replies."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tokenward.models.base import layout_of_both
from tokenward.models.forward import token_kl
from tokenward.models.loading import LanguageModel
from tokenward.sampling import Reply
from tokenward.scoring.values import Progress
from tokenward.tokens.batches import budgeted
from tokenward.tokens.rows import TokenRow
from tokenward.types import Comparison


def reply_rows(prompts: Sequence[TokenRow], replies: Sequence[Reply]) -> list[TokenRow]:
    """Replies as rows of one response each."""
    rows = []
    for prompt, reply in zip(prompts, replies, strict=True):
        comparison = Comparison(
            key=prompt.comparison.key,
            prompt=prompt.comparison.prompt,
            tools=prompt.comparison.tools,
            responses=(reply.text,),
            ranks=(0,),
            source="sample",
        )
        rows.append(TokenRow(comparison, prompt.asked, [reply.ids], [int(reply.ended)]))
    return rows


def divergence(
    policy: LanguageModel,
    start: LanguageModel,
    rows: Sequence[TokenRow],
    *,
    tokens_per_batch: int = 8192,
    progress: Progress | None = None,
) -> list[Tensor]:
    """KL(policy || start) over the vocabulary at each token of the policy's own replies, nats.  -> [len] each"""
    results: list[Tensor] = [torch.empty(0)] * len(rows)
    both = replace(policy, layout=layout_of_both(policy, start))
    for group in budgeted(rows, layout=both.layout, tokens=tokens_per_batch):
        batch = both.collate([rows[index] for index in group]).to(policy.device)
        kl = token_kl(policy.model, policy.head, start.model, start.head, batch).cpu()
        sizes = [len(rows[index].responses[0]) for index in group]
        for index, part in zip(group, kl.split(sizes), strict=True):
            results[index] = part
        if progress is not None:
            progress(len(group))
    return results
