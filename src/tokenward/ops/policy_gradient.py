"""Policy gradients with a reward per token: returns, baselines and means (TLM, arXiv 2306.00398)."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tokenward.ops.ragged import segment_sum, weighted_mean

Baseline = Literal["none", "mean", "leave_one_out"]
MeanOver = Literal["token", "sequence"]


def return_to_go(rewards: Tensor, owner: Tensor, discount: float = 1.0) -> Tensor:
    """``sum_{s >= t} discount^(s - t) r_s`` over the tokens of one's owner.  [n], [n] -> [n]

    Args:
        rewards: In the order of the tokens, those of an owner one after another.
        owner: Which sequence owns the token.
        discount: In [0, 1]; 1 is TLM's ``use_q_for_weight``.
    """
    returns, step = rewards, 1
    # Each round doubles how far ahead a token looks: no cumulative sum over the batch, no loss of digits.
    while step < len(rewards):
        ahead = torch.where(owner[step:] == owner[:-step], returns[step:], 0.0)
        returns = torch.cat((returns[:-step] + discount**step * ahead, returns[-step:]))
        step *= 2
    return returns


def baseline_mean(values: Tensor, response: Tensor, comparison: Tensor, comparisons: int) -> Tensor:
    """Mean of one's comparison: of the mean values of all its responses, one's own too.  [n], [n], [r] -> [n]"""
    means, has = _response_means(values, response, len(comparison))
    total = segment_sum(means, comparison, comparisons)
    return (total / segment_sum(has, comparison, comparisons))[comparison[response]]


def baseline_leave_one_out(values: Tensor, response: Tensor, comparison: Tensor, comparisons: int) -> Tensor:
    """Mean of the mean values of the other responses of one's comparison.  [n], [n], [r] -> [n]

    It does not depend on the response that it is subtracted from, so the expected gradient stays the same.
    0 where there is no other response.

    Args:
        values: What the loss weights tokens with: rewards or returns.
        response: Which response owns the token; responses without tokens count nowhere.
        comparison: Which comparison owns the response.
        comparisons: Number of comparisons.
    """
    means, has = _response_means(values, response, len(comparison))
    others = segment_sum(has, comparison, comparisons)[comparison] - has
    total = segment_sum(means, comparison, comparisons)[comparison] - means
    return torch.where(others > 0, total / others.clamp(min=1), 0.0)[response]


def credit(
    rewards: Tensor,
    response: Tensor,
    comparison: Tensor,
    comparisons: int,
    *,
    discount: float | None = None,
    baseline: Baseline = "none",
) -> Tensor:
    """What REINFORCE multiplies each log-probability with, without gradient.  [n], [n], [r] -> [n]

    Args:
        rewards: Of the tokens.
        response: Which response owns the token.
        comparison: Which comparison owns the response.
        comparisons: Number of comparisons.
        discount: Of the rewards to come; None counts a token's own reward only.
        baseline: What is subtracted; see :func:`baseline_mean` and :func:`baseline_leave_one_out`.
    """
    values = rewards.detach()
    if discount is not None:
        values = return_to_go(values, response, discount)
    if baseline == "none":
        return values
    function = baseline_mean if baseline == "mean" else baseline_leave_one_out
    return values - function(values, response, comparison, comparisons)


def comparison_mean(
    values: Tensor,
    weights: Tensor,
    response: Tensor,
    comparison: Tensor,
    comparisons: int,
    over: MeanOver = "token",
) -> Tensor:
    """Mean over a comparison's tokens, or over the means of its responses.  [n], [n], [n], [r] -> [b]"""
    if over == "token":
        return weighted_mean(values, weights, comparison[response], comparisons)
    means = weighted_mean(values, weights, response, len(comparison))
    has = (segment_sum(weights, response, len(comparison)) != 0).to(means.dtype)
    return weighted_mean(means, has, comparison, comparisons)


def reinforce(
    logp: Tensor,
    credits: Tensor,
    entropy: Tensor | None,
    mean: Callable[[Tensor], Tensor],
    *,
    alpha: float,
) -> Tensor:
    """``-mean(credit log pi) - alpha mean(H)``.  [n], [n], [n] or None -> [b]

    Args:
        logp: Of sampled tokens.
        credits: Of :func:`credit`.
        entropy: ``H``, of the policy's whole distribution at each token.
        mean: From tokens to comparisons; see :func:`comparison_mean`.
        alpha: Price of a nat of entropy.
    """
    loss = -mean(credits * logp)
    return loss if entropy is None else loss - alpha * mean(entropy)


def _response_means(values: Tensor, response: Tensor, responses: int) -> tuple[Tensor, Tensor]:
    """Mean per response, 0 without tokens, and whether it has tokens.  -> [r], [r]"""
    ones = torch.ones_like(values)
    has = (segment_sum(ones, response, responses) > 0).to(values.dtype)
    means = weighted_mean(values, ones, response, responses)
    return torch.where(has > 0, means, 0.0), has
