"""A model's own replies to held-out prompts, and how far it has gone from another where it replies."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tokenward.models.base import layout_of_both
from tokenward.models.forward import token_kl
from tokenward.models.loading import LanguageModel
from tokenward.sampling import Reply, SamplingSettings, sample_replies
from tokenward.stages.run import Run
from tokenward.stages.tables import eval_comparisons
from tokenward.tokens.batches import budgeted
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.template import Template
from tokenward.types import Comparison


def prompts_to_answer(run: Run, template: Template) -> list[TokenRow]:
    """Held-out prompts, at most ``evaluation.prompts``, chosen in an order that does not depend on the file."""
    rows, _ = eval_comparisons(run, template).fitting(run.limits)
    return rows.first_by_key(run.recipe.evaluation.prompts)


def answers(
    run: Run, model: LanguageModel, template: Template, prompts: Sequence[TokenRow], *, label: str
) -> list[Reply]:
    """One sampled reply to each prompt, with the settings of the recipe's evaluation."""
    table = run.recipe.evaluation
    settings = SamplingSettings(
        table.max_new_tokens, table.temperature, table.top_p, table.top_k, table.batch
    )
    with run.display.progress(label, len(prompts)) as bar:
        ids = [row.asked for row in prompts]
        return sample_replies(model, template, ids, settings, seed=run.recipe.seed, progress=bar.advance)


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
    run: Run, policy: LanguageModel, start: LanguageModel, rows: Sequence[TokenRow]
) -> list[Tensor]:
    """KL(policy || start) over the vocabulary at each token of the policy's own replies, nats.  -> [len] each"""
    results: list[Tensor] = [torch.empty(0)] * len(rows)
    with run.display.progress("KL to the start", len(rows)) as bar:
        both = replace(policy, layout=layout_of_both(policy, start))
        for group in budgeted(rows, layout=both.layout, tokens=run.recipe.scores.tokens_per_batch):
            batch = both.collate([rows[index] for index in group]).to(policy.device)
            kl = token_kl(policy.model, policy.head, start.model, start.head, batch).cpu()
            sizes = [len(rows[index].responses[0]) for index in group]
            for index, part in zip(group, kl.split(sizes), strict=True):
                results[index] = part
            bar.advance(len(group))
    return results
