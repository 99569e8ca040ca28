"""Policy gradients with one reward per token: returns, baselines and means (TLM, arXiv 2306.00398).

``response`` is the response that owns each token, ``comparison`` the comparison that owns each response.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from tokenward.ops.ragged import segment_sum, weighted_mean

Baseline = Literal["none", "mean", "leave_one_out"]
MeanOver = Literal["token", "sequence", "sum"]
Spread = Literal["token", "sequence"]


def return_to_go(rewards: Tensor, owner: Tensor, discount: float = 1.0) -> Tensor:
    """``sum_{s >= t} discount^(s - t) r_s`` over the later tokens of the same owner.  [n], [n] -> [n]

    Rewards are in token order and the tokens of an owner are contiguous. A discount of 1 is TLM's ``use_q_for_weight``.
    """
    returns, step = rewards, 1
    # Doubling: each round doubles the horizon. A cumulative sum over the whole batch would lose digits.
    while step < len(rewards):
        ahead = torch.where(owner[step:] == owner[:-step], returns[step:], 0.0)
        returns = torch.cat((returns[:-step] + discount**step * ahead, returns[-step:]))
        step *= 2
    return returns


def baseline_mean(values: Tensor, response: Tensor, comparison: Tensor, comparisons: int) -> Tensor:
    """Mean of the response means in the token's comparison, its own response included.  [n], [n], [r] -> [n]"""
    means, has = _response_means(values, response, len(comparison))
    total = segment_sum(means, comparison, comparisons)
    return (total / segment_sum(has, comparison, comparisons))[comparison[response]]


def baseline_leave_one_out(values: Tensor, response: Tensor, comparison: Tensor, comparisons: int) -> Tensor:
    """Mean of the means of the other responses in the comparison, 0 if there are none.  [n], [n], [r] -> [n]

    It does not depend on the response that it is subtracted from, so the expected gradient of a ``sum`` is unchanged (see
    :func:`comparison_mean`). Responses without tokens are ignored.
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
    spread: Spread = "token",
) -> Tensor:
    """Factor of each log-probability in REINFORCE, without gradient.  [n], [n], [r] -> [n]

    The discounted rewards from the token to the end of its response, or its own reward if ``discount`` is None, minus
    the baseline. With ``spread="sequence"`` every token has the sum of its response's rewards in their place.
    """
    values = rewards.detach()
    if spread == "sequence":
        values = segment_sum(values, response, len(comparison))[response]
    elif discount is not None:
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
    """Mean over all tokens of a comparison, or over the means or the ``sum`` of its responses.  [n], [n], [n], [r] -> [b]

    The first two divide by lengths that were sampled. Only of ``sum`` is the gradient, with the rewards from each token to the
    end as credit, that of the expected return if responses differ in length: the others favour short responses.
    """
    if over == "token":
        return weighted_mean(values, weights, comparison[response], comparisons)
    if over == "sum":
        count = segment_sum(torch.ones_like(comparison), comparison, comparisons)
        return segment_sum(values * weights, comparison[response], comparisons) / count
    means = weighted_mean(values, weights, response, len(comparison))
    has = (segment_sum(weights, response, len(comparison)) != 0).to(means.dtype)
    return weighted_mean(means, has, comparison, comparisons)


def reinforce(
    logp: Tensor, credits: Tensor, entropy: Tensor | None, mean: Callable[[Tensor], Tensor], *, alpha: float
) -> Tensor:
    """``-mean(credit log pi) - alpha mean(H)``.  [n], [n], [n] or None -> [b]

    ``mean`` maps tokens to comparisons, see :func:`comparison_mean`; ``entropy`` is that of the policy at each token.
    """
    loss = -mean(credits * logp)
    return loss if entropy is None else loss - alpha * mean(entropy)


def _response_means(values: Tensor, response: Tensor, responses: int) -> tuple[Tensor, Tensor]:
    """Mean of each response, 0 without tokens, and 1 if it has tokens.  -> [r], [r]"""
    ones = torch.ones_like(values)
    has = (segment_sum(ones, response, responses) > 0).to(values.dtype)
    means = weighted_mean(values, ones, response, responses)
    return torch.where(has > 0, means, 0.0), has
