"""Losses of single responses, and of K responses to one prompt. See :mod:`tokenward.losses` for what all of them take."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.losses.tokens import LISTS, ROWS, check_shape, tokens_of
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
    """``w (1 - sigma(+-beta (u - z)))``, plus for good responses.  [b t], [b t], [b t], [b] -> [b]

    ``u`` is the summed log-ratio. Ethayarajh et al. 2024 (arXiv 2402.01306), Eq. 8.

    Args:
        desirable: ``[b]`` bool, whether the response is a good one.
        anchor: ``z``, a KL divergence in nats, ``[b]`` or one number; it gets no gradient. 0 is TRL's ``apo_zero_unpaired``.
        beta: Scale, > 0.
        desirable_weight: The paper's lambda_D.
        undesirable_weight: lambda_U.
    """
    tokens = tokens_of(logp, weights, ROWS, beta=beta)
    check_shape("desirable", desirable, logp.shape[:1], "one bool per response, [b]")
    ratio = tokens.sum(tokens.logp - tokens.lay("reference", reference))
    return formulas.kto(
        ratio,
        desirable.bool(),
        torch.as_tensor(anchor, dtype=ratio.dtype, device=ratio.device).detach(),
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )


def weighted_likelihood(logp: Tensor, weights: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    """Reward-weighted maximum likelihood: ``-sum_t w_t log pi / z``, 0 without weight.  [b t], [b t] -> [b]

    TLM (Yang et al. 2023, arXiv 2306.00398), section on supervised data.

    Args:
        weights: Token rewards; 1 is plain supervised fine-tuning.
        lengths: ``z``, ``[b]``. None is the sum of the weights' sizes.
    """
    tokens = tokens_of(logp, weights, ROWS)
    total = tokens.sum(tokens.logp)
    if lengths is not None:
        check_shape("lengths", lengths, total.shape, "one number per response, [b]")
    return formulas.likelihood(total, tokens.sizes(tokens.weights) if lengths is None else lengths)


def token_kl(kl: Tensor, weights: Tensor) -> Tensor:
    """``sum_t |w_t| KL_t``, to be added to another loss.  [b t], [b t] -> [b]

    Args:
        kl: A KL divergence at each token, nats, with gradients: forward in TDPO (arXiv 2404.11999), reverse in TIS-DPO.
    """
    tokens = tokens_of(kl, weights, ROWS, name="kl")
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
    baseline: policy_gradient.Baseline = "none",
    mean_over: policy_gradient.MeanOver = "token",
) -> Tensor:
    """``-mean_t [r_t log pi + alpha H_t]`` of K sampled responses to a prompt.  [b k t] each -> [b]

    TLM (Yang et al. 2023, arXiv 2306.00398), section without supervised data.

    Args:
        rewards: Of the sampled tokens; no gradient.
        entropy: ``H``, of the policy's distribution at each token, nats, with gradients; None leaves the term out.
        reference: See the module; needed for ``kl``.
        alpha: Price of the entropy.
        kl: Each reward is lowered by ``kl (log pi - log pi_ref)`` of its token.
        discount: Weight a token with the discounted rewards from itself to the end; None with its own.
        baseline: What is subtracted: ``mean`` of the prompt's responses, or ``leave_one_out``, that of the others.
        mean_over: ``token``: over all tokens of the prompt; ``sequence``: over the means of its responses.
    """
    _one_of("baseline", baseline, policy_gradient.Baseline)
    _one_of("mean_over", mean_over, policy_gradient.MeanOver)
    if kl and reference is None:
        raise UserError(f"kl is {kl}, and there is no reference. Give reference [b k t], or leave kl out.")
    tokens = tokens_of(logp, weights, LISTS)
    keep = tokens.weights.nonzero().squeeze(-1)
    owners = (tokens.response[keep], tokens.comparison, tokens.comparisons)
    policy, earned = tokens.logp[keep], tokens.lay("rewards", rewards)[keep]
    if kl and reference is not None:
        earned = earned - kl * (policy.detach() - tokens.lay("reference", reference)[keep])
    return policy_gradient.reinforce(
        policy,
        policy_gradient.credit(earned, *owners, discount=discount, baseline=baseline),
        None if entropy is None else tokens.lay("entropy", entropy)[keep],
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
    """Likelihood of a ranking of K responses by their token rewards.  [b k t], [b k t], [b k] -> [b]

    ``-sum_k log(exp(e_k) / sum_{i >= k} exp(e_i))``, ``e = C f(r_1 .. r_T)``. TLM (Yang et al. 2023, arXiv 2306.00398),
    preference loss; ties are the mean over their orders.

    Args:
        rewards: A token reward model's, with gradients.
        weights: See the module. A response without weight is not there, so that prompts may have unequal K.
        ranks: 0 is the best.
        aggregate: ``f``.
        temperature: Of ``softmax`` and ``softmin``, > 0; the paper's beta.
        length_neutral: Log of the mean in place of the sum of exponentials, in ``softmax`` and ``softmin``.
        scale_by_length: Multiply by C, the mean length of the prompt's responses; ``sum`` never is.
        list_temperature: Divides ``e``, > 0.
    """
    tokens = tokens_of(
        rewards, weights, LISTS, name="rewards", temperature=temperature, list_temperature=list_temperature
    )
    _one_of("aggregate", aggregate, Aggregate)
    check_shape("ranks", ranks, rewards.shape[:2], "one rank per response, [b k]")
    settings = {"temperature": temperature, "mean": length_neutral} if aggregate in SOFT else {}
    lengths = segment_sum(tokens.weights, tokens.response, tokens.responses)
    scores = AGGREGATES[aggregate](tokens.logp, tokens.weights, tokens.response, tokens.responses, **settings)
    there = lengths != 0
    scores, owner = scores[there], tokens.comparison[there]
    if scale_by_length and aggregate in SCALED:
        scores = scores * group_mean_length(lengths[there], owner, tokens.comparisons)
    rank = ranks.flatten()[there]
    try:
        return list_likelihood(scores, rank, owner, tokens.comparisons, temperature=list_temperature)
    except ValueError as error:
        raise UserError(f"ranks have {error}. Give tied responses ranks of their own.") from error


def _one_of(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise UserError(f"{name} is {value!r}. Write one of {', '.join(get_args(choices))}.")
