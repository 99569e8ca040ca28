"""Losses of single responses, and of K responses to a prompt. :mod:`tokenward.losses` explains the common arguments."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.losses.tokens import LISTS, ROWS, Tokens, check_numbers, check_shape
from tokenward.ops import losses as formulas
from tokenward.ops import policy_gradient
from tokenward.ops.aggregates import AGGREGATES, SCALED, SOFT, group_mean_length
from tokenward.ops.listwise import plackett_luce as list_likelihood
from tokenward.ops.ragged import segment_sum

Aggregate = Literal["average", "sum", "softmax", "softmin"]


def kto(
    logp: Tensor,
    weights: Tensor,
    reference: Tensor,
    desirable: Tensor,
    anchor: Tensor | float = 0.0,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """``w (1 - sigma(+-beta (u - z)))``, with plus for desirable responses.  [b t], [b t], [b t], [b] -> [b]

    ``u`` is the summed log-ratio. Ethayarajh et al. 2024 (arXiv 2402.01306), Eq. 8.

    Args:
        desirable: ``[b]`` bool (or 0 and 1), whether the response is desirable.
        anchor: ``z``, a KL divergence in nats, ``[b]`` or one number; detached. 0 is TRL's ``apo_zero_unpaired``.
        desirable_weight: The paper's lambda_D.
        undesirable_weight: The paper's lambda_U.
    """
    tokens = Tokens(logp, weights, ROWS, beta=beta)
    check_shape("desirable", desirable, logp.shape[:1], "one bool per response, [b]")
    check_numbers(0.0, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    if desirable.dtype != torch.bool and not bool(((desirable == 0) | (desirable == 1)).all()):
        raise UserError(
            f"desirable has other values than True and False (or 1 and 0), such as {float(desirable.min())}. For labels of 1 and -1, use "
            "labels > 0.",
            code="wrong-labels",
        )
    ratio = tokens.sum(tokens.log_ratio(reference))
    anchor = torch.as_tensor(anchor, dtype=ratio.dtype, device=ratio.device).detach()
    if anchor.ndim:
        check_shape("anchor", anchor, ratio.shape, "one number, or one per response, [b]")
    scales = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    return formulas.kto(ratio, desirable.bool(), anchor, beta=beta, **scales)


def weighted_likelihood(logp: Tensor, weights: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    """Reward-weighted maximum likelihood: ``-sum_t w_t log pi / z``, 0 without weight.  [b t], [b t] -> [b]

    TLM (Yang et al. 2023, arXiv 2306.00398), section on supervised data.

    Args:
        weights: Token rewards. Weights of 1 give plain supervised fine-tuning.
        lengths: ``z``, ``[b]``; by default the sum of the absolute weights.
    """
    tokens = Tokens(logp, weights, ROWS)
    total = tokens.sum(tokens.logp)
    if lengths is not None:
        check_shape("lengths", lengths, total.shape, "one number per response, [b]")
    return formulas.likelihood(total, tokens.sizes(tokens.weights) if lengths is None else lengths)


def token_kl(kl: Tensor, weights: Tensor) -> Tensor:
    """``sum_t |w_t| KL_t``, to be added to another loss.  [b t], [b t] -> [b]

    Args:
        kl: KL divergence at each token, nats, with gradients: forward in TDPO (arXiv 2404.11999), reverse in TIS-DPO.
    """
    tokens = Tokens(kl, weights, ROWS, name="kl")
    return tokens.sum(tokens.logp, tokens.weights.abs())


def reinforce(
    logp: Tensor,
    weights: Tensor,
    rewards: Tensor,
    entropy: Tensor | None = None,
    reference: Tensor | None = None,
    *,
    alpha: float = 0.125,
    kl: float = 0.0,
    discount: float | None = None,
    spread: policy_gradient.Spread = "token",
    baseline: policy_gradient.Baseline = "none",
    mean_over: policy_gradient.MeanOver = "token",
) -> Tensor:
    """``-mean_t [r_t log pi + alpha H_t]`` over K sampled responses to a prompt.  [b k t] each -> [b]

    TLM (Yang et al. 2023, arXiv 2306.00398), section without supervised data.

    Args:
        rewards: Rewards of the sampled tokens; detached.
        entropy: ``H``, entropy of the policy at each token, nats, with gradients; None drops the term.
        reference: Needed if ``kl`` is not 0.
        alpha: Coefficient of the entropy.
        kl: Subtract ``kl (log pi - log pi_ref)`` from the reward of each token.
        discount: Weight each token by the rewards from itself to the end, discounted by this factor in [0, 1]; None uses its
            own reward alone.
        spread: ``sequence`` weights every token by the sum of its response's rewards; only without ``discount``.
        baseline: Subtract the ``mean`` over the responses of the prompt, or over the others (``leave_one_out``).
        mean_over: ``token`` averages over all tokens of the prompt, ``sequence`` over the means of its responses; both divide by
            sampled lengths. ``sum`` averages over the sums of its responses: with ``discount`` 1 its expected gradient is that of
            the expected return.
    """
    _check_choice("spread", spread, policy_gradient.Spread)
    _check_choice("baseline", baseline, policy_gradient.Baseline)
    _check_choice("mean_over", mean_over, policy_gradient.MeanOver)
    if kl and reference is None:
        raise UserError(
            f"kl is {kl}, but there is no reference. Pass reference [b k t], or leave kl out.",
            code="missing-reference",
        )
    check_numbers(0.0, alpha=alpha, kl=kl)
    if discount is not None and spread == "sequence":
        raise UserError(
            f"discount is {discount}, and spread is sequence, which has no later rewards to discount. Leave one of them out.",
            code="conflicting-settings",
        )
    if discount is not None:
        check_numbers(0.0, 1.0, discount=discount)
    tokens = Tokens(logp, weights, LISTS)
    keep = tokens.weights.nonzero().squeeze(-1)
    owners = (tokens.response[keep], tokens.comparison, tokens.comparisons)
    policy, earned = tokens.logp[keep], tokens.flatten("rewards", rewards)[keep]
    if kl and reference is not None:
        earned = earned - kl * (policy.detach() - tokens.flatten("reference", reference)[keep])
    return policy_gradient.reinforce(
        policy,
        policy_gradient.credit(earned, *owners, discount=discount, baseline=baseline, spread=spread),
        None if entropy is None else tokens.flatten("entropy", entropy)[keep],
        lambda values: policy_gradient.comparison_mean(values, tokens.weights[keep], *owners, mean_over),
        alpha=alpha,
    )


def plackett_luce(
    rewards: Tensor,
    weights: Tensor,
    ranks: Tensor,
    *,
    aggregate: Aggregate = "average",
    temperature: float = 2.0,
    length_neutral: bool = False,
    scale_by_length: bool = True,
    list_temperature: float = 1.0,
) -> Tensor:
    """Negative log-likelihood of a ranking of K responses by their token rewards.  [b k t], [b k t], [b k] -> [b]

    ``-sum_k log(exp(e_k) / sum_{i >= k} exp(e_i))``, ``e = C f(r_1 .. r_T)``. TLM (Yang et al. 2023, arXiv 2306.00398),
    preference loss. A tie costs the mean over its orders.

    Args:
        rewards: Rewards from a token reward model, with gradients.
        weights: A response without weight is left out, so prompts may have different numbers of responses.
        ranks: 0 is the best.
        aggregate: ``f``.
        temperature: Temperature of ``softmax`` and ``softmin``, > 0; the paper's beta.
        length_neutral: Use the mean instead of the sum of exponentials in ``softmax`` and ``softmin``.
        scale_by_length: Multiply by C, the mean length of the prompt's responses. ``sum`` is never scaled.
        list_temperature: Divides ``e``, > 0.
    """
    temperatures = {"temperature": temperature, "list_temperature": list_temperature}
    tokens = Tokens(rewards, weights, LISTS, name="rewards", **temperatures)
    _check_choice("aggregate", aggregate, Aggregate)
    check_shape("ranks", ranks, rewards.shape[:2], "one rank per response, [b k]")
    settings = {"temperature": temperature, "mean": length_neutral} if aggregate in SOFT else {}
    lengths = segment_sum(tokens.weights, tokens.response, tokens.responses)
    scores = AGGREGATES[aggregate](tokens.logp, tokens.weights, tokens.response, tokens.responses, **settings)
    present = lengths != 0
    scores, owner = scores[present], tokens.comparison[present]
    if scale_by_length and aggregate in SCALED:
        scores = scores * group_mean_length(lengths[present], owner, tokens.comparisons)
    rank = ranks.flatten()[present]
    try:
        return list_likelihood(scores, rank, owner, tokens.comparisons, temperature=list_temperature)
    except ValueError as error:
        raise UserError(
            f"ranks have {error}. Give the tied responses different ranks.", code="too-many-ties"
        ) from error


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise UserError(
            f"{name} is {value!r}. Use one of {', '.join(get_args(choices))}.", code="unknown-value"
        )
