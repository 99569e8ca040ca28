"""Losses over pairs: a chosen and a rejected response to one prompt. See :mod:`tokenward.losses` for what all of them take."""

from functools import partial

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.losses.tokens import PAIR, Pair, check_shape, tokens_of
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
    """``link(beta (u_w - u_l) - margin)``, the family of DPO.  ([b t], [b u]) each -> [b]

    ``u`` is the weighted sum of a response's log-ratios, or of its log-probabilities if there is no reference.

    Args:
        weights: See the module. A token of negative weight counts for the other side.
        link: From margins to losses, such as those of :mod:`tokenward.ops.links`: ``hinge`` is SLiC's (arXiv 2305.10425);
            ``functools.partial(links.robust, label_smoothing=0.1)`` is robust DPO (arXiv 2403.00409, Eq. 12).
        beta: Scale, > 0.
        margin: What the scaled difference must exceed.
        mean: Divide each sum by the sum of the weights' sizes.
    """
    tokens = tokens_of(logp, weights, PAIR, beta=beta)
    values = tokens.logp if reference is None else tokens.logp - tokens.lay("reference", reference)
    found = tokens.sides(tokens.mean(values) if mean else tokens.sum(values))
    return formulas.pairwise(*found, link=link, beta=beta, margin=margin)


def dpo(
    logp: Pair, weights: Pair, reference: Pair, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> Tensor:
    """Direct preference optimisation: ``-log sigma(beta (u_w - u_l))``.  ([b t], [b u]) each -> [b]

    ``u = sum_t w_t (log pi - log pi_ref)``. Rafailov et al. 2023 (arXiv 2305.18290), Eq. 7.

    Args:
        weights: See the module. Weights other than 0 and 1 give the weighted DPO of TGDPO, TIS-DPO, LD-DPO and others.
        beta: Scale of the implicit reward, > 0.
        label_smoothing: Assumed share of flipped labels (cDPO), in [0, 0.5).
    """
    tokens = tokens_of(logp, weights, PAIR, beta=beta)
    ratio = tokens.sum(tokens.logp - tokens.lay("reference", reference))
    if not 0 <= label_smoothing < 0.5:
        raise UserError(
            f"label_smoothing must be in [0, 0.5), got {label_smoothing}: at 0.5 no label is left."
        )
    return formulas.dpo(*tokens.sides(ratio), beta=beta, label_smoothing=label_smoothing)


def ipo(logp: Pair, weights: Pair, reference: Pair, *, beta: float = 0.1) -> Tensor:
    """``(u_w - u_l - 1 / (2 beta))^2`` with mean log-ratios ``u``, as TRL has it.  ([b t], [b u]) each -> [b]

    Azar et al. 2023 (arXiv 2310.12036), Eq. 17; ``beta`` > 0 is the paper's tau.
    """
    tokens = tokens_of(logp, weights, PAIR, beta=beta)
    ratio = tokens.mean(tokens.logp - tokens.lay("reference", reference))
    return formulas.ipo(*tokens.sides(ratio), beta=beta)


def sepo(
    logp: Pair, weights: Pair, *, gamma: float = 2.0, margin: float = 0.0, lengths: Pair | None = None
) -> Tensor:
    """Selective preference optimisation: ``-log sigma(gamma (m_w - m_l) - margin)``.  ([b t], [b u]) each -> [b]

    ``m = sum_t w_t log pi / z``. Yang et al. 2024 (arXiv 2408.13518), objective of section 3.

    Args:
        weights: 1 for the selected tokens.
        gamma: Scale, > 0; the paper searches 2.1 to 2.5.
        margin: The paper's lambda.
        lengths: ``z`` of each side, ``([b], [b])``. None is the sum of the weights' sizes. The paper's formula has the
            number of the response's tokens times the side's rate.
    """
    tokens = tokens_of(logp, weights, PAIR, gamma=gamma)
    if lengths is None:
        return formulas.margin_logistic(*tokens.sides(tokens.mean(tokens.logp)), scale=gamma, margin=margin)
    chosen, rejected = tokens.sides(tokens.sum(tokens.logp))
    for place, side in enumerate(lengths):
        check_shape(f"lengths[{place}]", side, chosen.shape, "one number per pair, [b]")
    return formulas.margin_logistic(chosen / lengths[0], rejected / lengths[1], scale=gamma, margin=margin)


def simpo(logp: Pair, weights: Pair, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """Simple preference optimisation: ``-log sigma(beta (m_w - m_l) - gamma)``.  ([b t], [b u]) each -> [b]

    ``m`` is the weighted mean of the log-probabilities. Meng et al. 2024 (arXiv 2405.14734), Eq. 6; TRL calls gamma
    ``simpo_gamma``.
    """
    return sepo(logp, weights, gamma=beta, margin=gamma)


def confpo(logp: Pair, weights: Pair, *, beta: float = 1.5, gamma: float = 1.6) -> Tensor:
    """SimPO over the tokens less probable than the mean probability of their response.  ([b t], [b u]) each -> [b]

    ``-log sigma(beta (m_w - m_l) - gamma)`` with mean log-probabilities ``m`` over these tokens. Yoon et al. 2025 (arXiv
    2506.08712). The selection has no gradient. The loss of a pair is 0 if one side has no such token.
    """
    tokens = tokens_of(logp, weights, PAIR, beta=beta)
    owner = (tokens.response, tokens.responses)
    scores = torch.where(tokens.weights != 0, tokens.logp.detach().exp(), torch.nan)
    cut = transforms.threshold_of(scores, *owner, "mean", value=0.0, factor=0.0, classes=2, cut=0)
    kept = transforms.keep_side(scores, tokens.response, cut, "below").nan_to_num(0.0)
    chosen, rejected = tokens.sides(segment_sum(kept, *owner))
    empty = (chosen == 0) | (rejected == 0)
    # An empty pair is computed with all its tokens, so that its gradient is 0 and not NaN.
    used = torch.where(empty[tokens.response // 2], tokens.weights, kept)
    means = tokens.sides(tokens.mean(tokens.logp, used))
    return torch.where(empty, 0.0, formulas.margin_logistic(*means, scale=beta, margin=gamma))


def orpo(logp: Pair, weights: Pair, *, beta: float = 0.1) -> Tensor:
    """``-m_w - beta log sigma(log odds(m_w) - log odds(m_l))`` with mean log-probabilities ``m``.  -> [b]

    Takes ``([b t], [b u])`` each. Hong et al. 2024 (arXiv 2403.07691), Eq. 6; ``beta`` > 0 is the paper's lambda.
    """
    tokens = tokens_of(logp, weights, PAIR, beta=beta)
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
    """DPO with each response's KL divergence in the margin.  ([b t], [b u]) each -> [b]

    ``-log sigma(beta (u_w - u_l - alpha (D_l - D_w)))``. Zeng et al. 2024 (arXiv 2404.11999), TDPO2; TDPO1 is ``alpha=1.0,
    stop_gradient=False``.

    Args:
        weights: See the module; divergences are summed by the sizes of the weights.
        kl: KL(reference || policy) over the whole vocabulary at each token, nats, with gradients.
        beta: Scale of the implicit reward, > 0.
        alpha: Scale of the divergences.
        stop_gradient: Whether the chosen side's divergence has no gradient.
    """
    tokens = tokens_of(logp, weights, PAIR, beta=beta)
    ratio = tokens.sides(tokens.sum(tokens.logp - tokens.lay("reference", reference)))
    chosen, rejected = tokens.sides(tokens.sum(tokens.lay("kl", kl), tokens.weights.abs()))
    chosen = chosen.detach() if stop_gradient else chosen
    return formulas.tdpo(*ratio, chosen, rejected, beta=beta, alpha=alpha)


def tgdpo(
    logp: Pair, weights: Pair, reference: Pair, rewards: Pair, *, beta: float = 0.1, alpha: float = 0.5
) -> Tensor:
    """DPO whose tokens count ``1 + alpha r_t``, and ``1 - alpha r_t`` if rejected.  ([b t], [b u]) each -> [b]

    Zhu et al. 2025 (arXiv 2506.14574).

    Args:
        weights: See the module; they multiply those of the rewards.
        rewards: ``r``, a preference-trained model's token rewards, nats; no gradient.
        beta: Scale of the implicit reward, > 0.
        alpha: Strength of the online.
    """
    tokens = tokens_of(logp, weights, PAIR, beta=beta)
    signed = tokens.signs * tokens.lay("rewards", rewards).detach()
    ratio = tokens.logp - tokens.lay("reference", reference)
    total = tokens.sum(ratio, tokens.weights * transforms.affine(signed, alpha, 1.0))
    return formulas.dpo(*tokens.sides(total), beta=beta)


def tis_dpo(
    logp: Pair, weights: Pair, reference: Pair, rewards: Pair, *, low: float, high: float, beta: float = 0.1
) -> Tensor:
    """DPO whose tokens count ``exp(r_t)``, and ``exp(-r_t)`` if rejected.  ([b t], [b u]) each -> [b]

    Liu et al. 2024 (arXiv 2410.04350).

    Args:
        weights: See the module; they multiply those of the rewards.
        rewards: ``r``, the log-ratio of a model trained on the pairs and one trained on them swapped, nats; no gradient.
        low: ``r`` is no lower; the paper does not give its bounds.
        high: ``r`` is no higher.
        beta: Scale of the implicit reward, > 0.
    """
    tokens = tokens_of(logp, weights, PAIR, beta=beta)
    signed = tokens.signs * transforms.clamp(tokens.lay("rewards", rewards).detach(), low, high)
    ratio = tokens.logp - tokens.lay("reference", reference)
    total = tokens.sum(ratio, tokens.weights * transforms.exponential(signed, 1.0))
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
    """TDPO1 with a learned mask for each token's log-ratio and one for its divergence.  ([b t], [b u]) each -> [b]

    ``-log sigma(beta (u_w - u_l - (d_l - d_w)))`` plus the masks' sizes, ``u = sum_t m_u(t) delta_t``, ``d = sum_t m_d(t)
    KL_t``. Christopoulou et al. 2024 (arXiv 2410.05102).

    Args:
        kl: KL(reference || policy) over the whole vocabulary at each token, nats, with gradients.
        ratio_mask: ``m_u``, 0 or more, with gradients.
        kl_mask: ``m_d``; the same tensors for a common mask.
        beta: Scale of the implicit reward, > 0.
        l1_ratio: Price of ``m_u``, summed over both responses' tokens.
        l1_kl: Price of ``m_d``.
    """
    tokens = tokens_of(logp, weights, PAIR, beta=beta)
    mask, other = tokens.lay("ratio_mask", ratio_mask), tokens.lay("kl_mask", kl_mask)
    one = torch.ones_like(tokens.weights)
    ratio = tokens.logp - tokens.lay("reference", reference)
    ratio = tokens.sum(mask * tokens.weights * ratio, one)
    divergence = tokens.sum(other * tokens.weights.abs() * tokens.lay("kl", kl), one)
    paid = tokens.sides(tokens.sum(formulas.mask_price(mask, other, l1_ratio=l1_ratio, l1_kl=l1_kl), one))
    (chosen, rejected), (chosen_kl, rejected_kl) = tokens.sides(ratio), tokens.sides(divergence)
    loss = formulas.tdpo(chosen, rejected, chosen_kl, rejected_kl, beta=beta, alpha=1.0)
    return loss + paid[0] + paid[1]


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

    ``delta`` is a token's log-ratio. The t-th tokens with weight of both responses are compared, up to the shorter one's
    last. arXiv 2605.12288.

    Args:
        weights: See the module; a position counts the product of its two weights.
        baseline: Of each token's state; ``b`` is the rejected token's less the chosen one's. KL(reference || policy) is
            variant A, a network's value variant Q, None is no baseline.
        beta: Scale, > 0.
        link: From margins to losses, such as those of :mod:`tokenward.ops.links`; the paper's SBA by default.
    """
    tokens = tokens_of(logp, weights, PAIR, beta=beta)
    kept = tokens.weights.nonzero().squeeze(-1)
    chosen, rejected, pair = aligned(kept, tokens.response, tokens.responses)
    delta = tokens.logp - tokens.lay("reference", reference)
    state = torch.zeros_like(delta) if baseline is None else tokens.lay("baseline", baseline)
    margin = formulas.token_margin(delta[chosen], delta[rejected], state[rejected] - state[chosen], beta=beta)
    weight = tokens.weights[chosen] * tokens.weights[rejected]
    return weighted_mean(link(margin), weight, pair, tokens.comparisons)


def treg(
    logp: Pair, weights: Pair, reference: Pair, *, beta: float = 0.1, stop_gradient: bool = True
) -> Tensor:
    """T-REG's regulariser ``-s beta sum_t w_t log pi``, to be added to DPO's loss.  ([b t], [b u]) each -> [b]

    ``s = sigma(r_l - r_w)``, ``r`` beta times the log-ratio over the tokens with weight. arXiv 2412.02685.

    Args:
        weights: The paper's token rewards, of both signs.
        beta: As in DPO's loss, > 0.
        stop_gradient: Whether ``s`` has no gradient.
    """
    tokens = tokens_of(logp, weights, PAIR, beta=beta)
    present = (tokens.weights != 0).to(tokens.weights.dtype)
    ratio = tokens.sum(tokens.logp - tokens.lay("reference", reference), present)
    weight = formulas.pair_weight(*tokens.sides(ratio), beta=beta)
    weight = weight.detach() if stop_gradient else weight
    return formulas.treg(weight, *tokens.sides(tokens.sum(tokens.logp)), beta=beta)
