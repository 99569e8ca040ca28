"""Losses over pairs: a chosen and a rejected response to one prompt. :mod:`tokenward.losses` explains the common arguments."""

from functools import partial

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.losses.tokens import PAIR, Pair, Tokens, check_numbers, check_positive, check_shape
from tokenward.ops import links, transforms
from tokenward.ops import losses as formulas
from tokenward.ops.ragged import aligned, segment_sum, weighted_mean

SBA: links.Link = partial(links.scaled_basu, power=0.0, scale=4.0)
"""TBPO's link."""


def pairwise(
    logp: Pair,
    weights: Pair,
    reference: Pair | None = None,
    *,
    link: links.Link = links.logistic,
    beta: float = 0.1,
    margin: float = 0.0,
    mean: bool = False,
) -> Tensor:
    """The DPO family: ``link(beta (u_w - u_l) - margin)``.  ([b t], [b u]) each -> [b]

    ``u`` is the weighted sum of a response's log-ratios, or of its log-probabilities without a reference.

    Args:
        weights: A token of negative weight counts for the other side.
        link: Maps margins to losses, see :mod:`tokenward.ops.links`: ``hinge`` is SLiC (arXiv 2305.10425);
            ``functools.partial(links.robust, label_smoothing=0.1)`` is robust DPO (arXiv 2403.00409, Eq. 12).
        margin: Target margin of the scaled difference.
        mean: Divide each sum by the sum of the absolute weights.
    """
    tokens = Tokens(logp, weights, PAIR, beta=beta)
    check_numbers(margin=margin)
    values = tokens.logp if reference is None else tokens.log_ratio(reference)
    sides = tokens.sides(tokens.mean(values) if mean else tokens.sum(values))
    loss = formulas.pairwise(*sides, link=link, beta=beta, margin=margin)
    check_shape("the result of link", loss, sides[0].shape, "one number per pair, [b]")
    return loss


def dpo(
    logp: Pair, weights: Pair, reference: Pair, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Tensor:
    """Direct preference optimization: ``-log sigma(beta (u_w - u_l))``.  ([b t], [b u]) each -> [b]

    ``u = sum_t w_t (log pi - log pi_ref)``. Rafailov et al. 2023 (arXiv 2305.18290), Eq. 7.

    Args:
        weights: Weights other than 0 and 1 give the weighted DPO of TGDPO, TIS-DPO, LD-DPO and others.
        label_smoothing: Assumed share of flipped labels (cDPO), in [0, 0.5).
    """
    tokens = Tokens(logp, weights, PAIR, beta=beta)
    ratio = tokens.sum(tokens.log_ratio(reference))
    check_numbers(label_smoothing=label_smoothing)
    if not 0 <= label_smoothing < 0.5:
        raise UserError(
            f"label_smoothing must be in [0, 0.5), got {label_smoothing}: at 0.5 the labels carry no information.",
            code="out-of-range",
        )
    return formulas.dpo(*tokens.sides(ratio), beta=beta, label_smoothing=label_smoothing)


def ipo(logp: Pair, weights: Pair, reference: Pair, *, beta: float = 0.1) -> Tensor:
    """``(u_w - u_l - 1 / (2 beta))^2`` with mean log-ratios ``u``, as in TRL.  ([b t], [b u]) each -> [b]

    Azar et al. 2023 (arXiv 2310.12036), Eq. 17; ``beta`` > 0 is the paper's tau.
    """
    tokens = Tokens(logp, weights, PAIR, beta=beta)
    return formulas.ipo(*tokens.sides(tokens.mean(tokens.log_ratio(reference))), beta=beta)


def sepo(
    logp: Pair, weights: Pair, *, gamma: float = 2.0, margin: float = 0.0, lengths: Pair | None = None
) -> Tensor:
    """Selective preference optimization: ``-log sigma(gamma (m_w - m_l) - margin)``.  ([b t], [b u]) each -> [b]

    ``m = sum_t w_t log pi / z``. Yang et al. 2024 (arXiv 2408.13518), objective of section 3.

    Args:
        weights: 1 for the selected tokens.
        gamma: Scale, > 0; the paper searches 2.1 to 2.5.
        margin: The paper's lambda.
        lengths: ``z`` of each side, ``([b], [b])``; by default the sum of the absolute weights. The paper's formula uses
            the number of the response's tokens times the side's selection rate.
    """
    tokens = Tokens(logp, weights, PAIR, gamma=gamma)
    check_numbers(margin=margin)
    if lengths is None:
        return formulas.margin_logistic(*tokens.sides(tokens.mean(tokens.logp)), scale=gamma, margin=margin)
    chosen, rejected = tokens.sides(tokens.sum(tokens.logp))
    for place, side in enumerate(lengths):
        check_shape(f"lengths[{place}]", side, chosen.shape, "one number per pair, [b]")
    return formulas.margin_logistic(chosen / lengths[0], rejected / lengths[1], scale=gamma, margin=margin)


def simpo(logp: Pair, weights: Pair, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """Simple preference optimization: ``-log sigma(beta (m_w - m_l) - gamma)``.  ([b t], [b u]) each -> [b]

    ``m`` is the weighted mean log-probability. Meng et al. 2024 (arXiv 2405.14734), Eq. 6. TRL calls ``gamma``
    ``simpo_gamma``.
    """
    check_numbers(gamma=gamma)
    check_positive(beta=beta)
    return sepo(logp, weights, gamma=beta, margin=gamma)


def confpo(logp: Pair, weights: Pair, *, beta: float = 1.5, gamma: float = 1.6) -> Tensor:
    """SimPO over the tokens below the mean token probability of their response.  ([b t], [b u]) each -> [b]

    ``-log sigma(beta (m_w - m_l) - gamma)`` with mean log-probabilities ``m`` over these tokens. Yoon et al. 2025 (arXiv
    2506.08712). No gradient flows through the selection. The loss of a pair is 0 if a side has no such token.
    """
    tokens = Tokens(logp, weights, PAIR, beta=beta)
    check_numbers(gamma=gamma)
    owner = (tokens.response, tokens.responses)
    scores = torch.where(tokens.weights != 0, tokens.logp.detach().exp(), torch.nan)
    cut = transforms.threshold_of(scores, *owner, "mean", value=0.0, factor=0.0, classes=2, cut=0)
    kept = transforms.keep_side(scores, tokens.response, cut, "below").nan_to_num(0.0)
    chosen, rejected = tokens.sides(segment_sum(kept, *owner))
    empty = (chosen == 0) | (rejected == 0)
    # An empty pair is computed over all its tokens, so that its gradient is 0 and not NaN.
    used = torch.where(empty[tokens.response // 2], tokens.weights, kept)
    means = tokens.sides(tokens.mean(tokens.logp, used))
    return torch.where(empty, 0.0, formulas.margin_logistic(*means, scale=beta, margin=gamma))


def orpo(logp: Pair, weights: Pair, *, beta: float = 0.1) -> Tensor:
    """``-m_w - beta log sigma(log odds(m_w) - log odds(m_l))`` with mean log-probabilities ``m``.  -> [b]

    Takes ``([b t], [b u])`` each. Hong et al. 2024 (arXiv 2403.07691), Eq. 6; ``beta`` > 0 is the paper's lambda.
    """
    tokens = Tokens(logp, weights, PAIR, beta=beta)
    chosen, rejected = tokens.sides(tokens.mean(tokens.logp))
    return formulas.orpo(formulas.odds_ratio(chosen, rejected), chosen, beta=beta)


def tdpo(
    logp: Pair,
    weights: Pair,
    reference: Pair,
    kl: Pair,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
    stop_gradient: bool = True,
) -> Tensor:
    """DPO with the KL divergence of each response in the margin.  ([b t], [b u]) each -> [b]

    ``-log sigma(beta (u_w - u_l - alpha (D_l - D_w)))``. Zeng et al. 2024 (arXiv 2404.11999), TDPO2; TDPO1 is
    ``alpha=1.0, stop_gradient=False``.

    Args:
        weights: Divergences are summed with the absolute weights.
        alpha: Scale of the divergences.
        stop_gradient: Detach the divergence of the chosen side.
    """
    tokens = Tokens(logp, weights, PAIR, beta=beta)
    check_numbers(alpha=alpha)
    ratio = tokens.sides(tokens.sum(tokens.log_ratio(reference)))
    chosen, rejected = tokens.sides(tokens.sum(tokens.flatten("kl", kl), tokens.weights.abs()))
    chosen = chosen.detach() if stop_gradient else chosen
    return formulas.tdpo(*ratio, chosen, rejected, beta=beta, alpha=alpha)


def tgdpo(
    logp: Pair, weights: Pair, reference: Pair, rewards: Pair, *, beta: float = 0.1, alpha: float = 0.5
) -> Tensor:
    """DPO with token weights ``1 + alpha r_t`` (chosen) and ``1 - alpha r_t`` (rejected).  ([b t], [b u]) each -> [b]

    Zhu et al. 2025 (arXiv 2506.14574).

    Args:
        weights: Multiplied with the weights above.
        rewards: ``r``, token rewards of a preference-trained model, nats; detached.
        alpha: Strength of the token rewards.
    """
    tokens = Tokens(logp, weights, PAIR, beta=beta)
    check_numbers(alpha=alpha)
    signed = tokens.signs * tokens.flatten("rewards", rewards).detach()
    total = tokens.sum(tokens.log_ratio(reference), tokens.weights * transforms.affine(signed, alpha, 1.0))
    return formulas.dpo(*tokens.sides(total), beta=beta)


def tis_dpo(
    logp: Pair, weights: Pair, reference: Pair, rewards: Pair, *, low: float, high: float, beta: float = 0.1
) -> Tensor:
    """DPO with token weights ``exp(r_t)`` (chosen) and ``exp(-r_t)`` (rejected).  ([b t], [b u]) each -> [b]

    Liu et al. 2024 (arXiv 2410.04350).

    Args:
        weights: Multiplied with the weights above.
        rewards: ``r``, the log-ratio of a model trained on the pairs to one trained on the swapped pairs, nats; detached.
        low: Lower bound of ``r``. The paper does not give its bounds.
        high: Upper bound of ``r``.
    """
    tokens = Tokens(logp, weights, PAIR, beta=beta)
    check_numbers(low=low, high=high)
    if low > high:
        raise UserError(f"low must be at most high, got {low} and {high}.", code="out-of-range")
    signed = tokens.signs * transforms.clamp(tokens.flatten("rewards", rewards).detach(), low, high)
    total = tokens.sum(tokens.log_ratio(reference), tokens.weights * transforms.exponential(signed, 1.0))
    return formulas.dpo(*tokens.sides(total), beta=beta)


def sparsepo(
    logp: Pair,
    weights: Pair,
    reference: Pair,
    kl: Pair,
    ratio_mask: Pair,
    kl_mask: Pair,
    *,
    beta: float = 0.1,
    l1_ratio: float = 0.0,
    l1_kl: float = 0.0,
) -> Tensor:
    """TDPO1 with learned masks on the log-ratio and the divergence of each token.  ([b t], [b u]) each -> [b]

    ``-log sigma(beta (u_w - u_l - (d_l - d_w)))`` plus an L1 penalty of the masks, ``u = sum_t m_u(t) delta_t``,
    ``d = sum_t m_d(t) KL_t``. Christopoulou et al. 2024 (arXiv 2410.05102).

    Args:
        ratio_mask: ``m_u``, >= 0, with gradients.
        kl_mask: ``m_d``; pass the same tensors for a common mask.
        l1_ratio: L1 coefficient of ``m_u``, summed over the tokens of both responses.
        l1_kl: L1 coefficient of ``m_d``.
    """
    tokens = Tokens(logp, weights, PAIR, beta=beta)
    check_numbers(0.0, l1_ratio=l1_ratio, l1_kl=l1_kl)
    mask, other = tokens.flatten("ratio_mask", ratio_mask), tokens.flatten("kl_mask", kl_mask)
    one = torch.ones_like(tokens.weights)
    ratio = tokens.sum(mask * tokens.weights * tokens.log_ratio(reference), one)
    divergence = tokens.sum(other * tokens.weights.abs() * tokens.flatten("kl", kl), one)
    penalty = tokens.sides(tokens.sum(formulas.mask_price(mask, other, l1_ratio=l1_ratio, l1_kl=l1_kl), one))
    loss = formulas.tdpo(*tokens.sides(ratio), *tokens.sides(divergence), beta=beta, alpha=1.0)
    return loss + penalty[0] + penalty[1]


def tbpo(
    logp: Pair,
    weights: Pair,
    reference: Pair,
    baseline: Pair | None = None,
    *,
    beta: float = 0.1,
    link: links.Link = SBA,
) -> Tensor:
    """A preference at every position: the mean of ``link(beta (delta_w - delta_l - b))``.  ([b t], [b u]) each -> [b]

    ``delta`` is the log-ratio of a token. The t-th weighted tokens of the two responses are compared, up to the end of
    the shorter response. arXiv 2605.12288.

    Args:
        weights: The weight of a position is the product of its two weights.
        baseline: One value per token; ``b`` is that of the rejected token minus that of the chosen one. Use KL(reference ||
            policy) for variant A, the value of a network for variant Q, None for no baseline.
        link: Maps margins to losses, see :mod:`tokenward.ops.links`; by default the paper's SBA.
    """
    tokens = Tokens(logp, weights, PAIR, beta=beta)
    kept = tokens.weights.nonzero().squeeze(-1)
    chosen, rejected, pair = aligned(kept, tokens.response, tokens.responses)
    delta = tokens.log_ratio(reference)
    state = torch.zeros_like(delta) if baseline is None else tokens.flatten("baseline", baseline)
    margin = formulas.token_margin(delta[chosen], delta[rejected], state[rejected] - state[chosen], beta=beta)
    weight = tokens.weights[chosen] * tokens.weights[rejected]
    loss = link(margin)
    check_shape("the result of link", loss, margin.shape, "one number per position, [m]")
    return weighted_mean(loss, weight, pair, tokens.comparisons)


def treg(
    logp: Pair, weights: Pair, reference: Pair, *, beta: float = 0.1, stop_gradient: bool = True
) -> Tensor:
    """T-REG's regularizer ``-s beta sum_t w_t log pi``, to be added to a DPO loss.  ([b t], [b u]) each -> [b]

    ``s = sigma(r_l - r_w)``, where ``r`` is beta times the log-ratio over the weighted tokens. arXiv 2412.02685.

    Args:
        weights: The paper's token rewards, of either sign.
        stop_gradient: Detach ``s``.
    """
    tokens = Tokens(logp, weights, PAIR, beta=beta)
    present = (tokens.weights != 0).to(tokens.weights.dtype)
    ratio = tokens.sum(tokens.log_ratio(reference), present)
    weight = formulas.pair_weight(*tokens.sides(ratio), beta=beta)
    weight = weight.detach() if stop_gradient else weight
    return formulas.treg(weight, *tokens.sides(tokens.sum(tokens.logp)), beta=beta)
