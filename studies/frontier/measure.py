"""What a policy does at one point of its training: its replies, their exact KL to the start, and its log-probabilities of pairs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

BATCH = 512
"""Replies sampled at once."""

READ = 32
"""Replies read at once, which stay in a processor's cache."""


class Sampled(NamedTuple):
    """Replies to prompts.

    Attributes:
        ids: ``[n, t]``.
        logp: ``[n, t, v]``, log-probabilities that the tokens were drawn from, in nats; None if they were not kept.
    """

    ids: Tensor
    logp: Tensor | None


def allowed(logits: Tensor, banned: Sequence[int]) -> Tensor:
    """Log-probabilities over all tokens but the banned ones, which have -1e9.  [..., v] -> [..., v]"""
    return logits.float().index_fill(-1, torch.tensor(banned), -1e9).log_softmax(-1)


@torch.no_grad()
def sampled(
    model: PreTrainedModel,
    prompts: Tensor,
    length: int,
    banned: Sequence[int],
    *,
    seed: Sequence[int],
    keep: bool = False,
) -> Sampled:
    """Sample replies of a fixed length to prompts of one length.

    A reply depends on its own row of random numbers, so two policies that are nearly the same give nearly the same replies, which
    makes their paired difference precise.

    Args:
        model: The policy.
        prompts: ``[n, p]``.
        length: Tokens of a reply.
        banned: Tokens that are not sampled.
        seed: Of the random numbers.
        keep: Whether to keep the log-probabilities.
    """
    chance = torch.from_numpy(np.random.default_rng(list(seed)).random((len(prompts), length)))
    found, kept = list[Tensor](), list[Tensor]()
    for part, own in zip(prompts.split(BATCH), chance.split(BATCH), strict=True):
        ids, cache, written, logps = part, None, list[Tensor](), list[Tensor]()
        for step in range(length):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            logp = allowed(out.logits[:, -1], banned)
            cumulative = logp.double().exp().cumsum(-1)
            drawn = own[:, step : step + 1] * cumulative[:, -1:]
            ids = torch.searchsorted(cumulative, drawn, right=True).clamp_(max=cumulative.shape[-1] - 1)
            written.append(ids)
            if keep:
                logps.append(logp)
        found.append(torch.cat(written, 1))
        if keep:
            kept.append(torch.stack(logps, 1))
    return Sampled(torch.cat(found), torch.cat(kept) if keep else None)


@torch.no_grad()
def logps_of(model: PreTrainedModel, prompts: Tensor, replies: Tensor, banned: Sequence[int]) -> Tensor:
    """Log-probabilities of the next token at every place of some replies, over the whole vocabulary.  -> [n, t, v]"""
    found = []
    for part, own in zip(prompts.split(READ), replies.split(READ), strict=True):
        out = model(input_ids=torch.cat([part, own], 1), logits_to_keep=own.shape[1] + 1)
        found.append(allowed(out.logits[:, :-1], banned))
    return torch.cat(found)


def divergence(policy: Tensor, start: Tensor) -> Tensor:
    """KL(policy || start) of each reply, summed over its places, in nats.  [n, t, v], [n, t, v] -> [n]"""
    return (policy.exp() * (policy - start)).sum((-1, -2))


def of_tokens(logp: Tensor, replies: Tensor) -> Tensor:
    """Log-probability of each reply.  [n, t, v], [n, t] -> [n]"""
    return logp.gather(-1, replies[..., None]).squeeze(-1).sum(-1)
