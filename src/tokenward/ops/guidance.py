"""Bounds of token rewards, and what becomes of rewards in the language model's loss: weights, returns, baselines.

TLM (arXiv 2306.00398), sections on the reward model and on training the language model.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenward.ops.ragged import segment_logsumexp, segment_sum, weighted_mean

Transform = Literal["identity", "exp", "power"]
Baseline = Literal["none", "mean", "leave_one_out"]
MeanOver = Literal["token", "sequence"]


def bound_softplus(z: Tensor, low: float, high: float, *, exact: bool = False) -> Tensor:
    """TLM's soft bound of a raw reward on two sides, increasing in ``z``.  [n] -> [n]

    ``u = high - softplus(high - z)``, ``r = low + softplus(u - low)``.

    The second softplus lifts the ceiling: the range is ``(low, low + softplus(high - low))``, for the published
    1e-8 and 1 that is (1e-8, 1.3133) and not (0, 1).

    Args:
        z: Output of the reward head, any real number.
        low: Lower limit.
        high: Upper limit of the first step.
        exact: Rescale, so that the range is ``(low, high)``.
    """
    under = high - _softplus(high - z)
    above = _softplus(under - low)
    if exact:
        above = above * (
            (high - low) / _softplus(torch.as_tensor(high - low, dtype=z.dtype, device=z.device))
        )
    return low + above


def bound_sigmoid(z: Tensor, low: float, high: float) -> Tensor:
    """``low + (high - low) sigma(z)``, in ``(low, high)``.  [n] -> [n]"""
    return low + (high - low) * z.sigmoid()


def likelihood_weights(
    rewards: Tensor,
    weights: Tensor,
    owner: Tensor,
    count: int,
    *,
    transform: Transform = "identity",
    temperature: float = 1.0,
    power: float = 1.0,
    uniform: float = 0.0,
) -> Tensor:
    """Share of each token in its owner's likelihood; the shares of an owner sum to 1.  [n], [n], [n] -> [n]

    ``w_t = f(r_t) / sum_t' f(r_t')`` with ``f(r) = r`` in the paper (TLM, reward-weighted maximum likelihood).
    No gradient flows back to the rewards.

    Args:
        rewards: > 0 for ``identity`` and ``power``, which give NaN otherwise.
        weights: How often each token counts; 0 removes it, whatever its reward, and gives 0.
        owner: Which sequence owns the token.
        count: Number of sequences.
        transform: ``f``: ``identity``, ``exp`` of ``r / temperature``, or ``r`` to the ``power``.
        temperature: For ``exp``, > 0.
        power: For ``power``.
        uniform: Share of equal weights mixed in, in [0, 1].
    """
    present = weights != 0
    rewards = torch.where(present, rewards.detach(), 1.0)
    logits = rewards / temperature if transform == "exp" else rewards.log()
    if transform == "power":
        logits = power * logits
    whole = segment_logsumexp(logits, weights, owner, count)
    shares = weights * (logits - whole[owner]).exp()
    # Once more, because the difference of large logarithms is good to a millionth only.
    shares = shares / segment_sum(shares, owner, count)[owner]
    equal = weights / segment_sum(weights, owner, count)[owner]
    return torch.where(present, (1 - uniform) * shares + uniform * equal, 0.0)


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


def _softplus(z: Tensor) -> Tensor:
    """Softplus without torch's step to the identity at 20, which is not monotone in float64."""
    return -F.logsigmoid(-z)
