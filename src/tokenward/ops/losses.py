"""Preference losses: sequence statistics in, one loss per pair out, never reduced."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenward.ops.links import Link, log_odds, logistic


def dpo(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Direct preference optimisation, with label smoothing (cDPO).  [b], [b] -> [b]

    ``-(1 - e) log sigma(beta (chosen - rejected)) - e log sigma(-beta (chosen - rejected))``

    Rafailov et al. 2023 (arXiv 2305.18290), Eq. 7; smoothing from Mitchell's cDPO note.

    Args:
        chosen: Log-ratio ``log pi - log pi_ref`` of the preferred response, summed over its tokens.
        rejected: The same of the other response.
        beta: Scale of the implicit reward, > 0.
        label_smoothing: Assumed share ``e`` of flipped labels, in [0, 0.5).
    """
    logits = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def ipo(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Identity preference optimisation: ``(chosen - rejected - 1 / (2 beta))^2``.  [b], [b] -> [b]

    Azar et al. 2023 (arXiv 2310.12036), Eq. 17.

    Args:
        chosen: Log-ratio of the preferred response; the mean over its tokens, as TRL has it, keeps
            the target independent of length.
        rejected: The same of the other response.
        beta: Regularisation strength (tau in the paper), > 0.
    """
    return (chosen - rejected - 1 / (2 * beta)).square()


def margin_logistic(chosen: Tensor, rejected: Tensor, *, scale: float, margin: float = 0.0) -> Tensor:
    """Reference-free logistic loss with a target margin.  [b], [b] -> [b]

    ``-log sigma(scale (chosen - rejected) - margin)``

    SimPO (arXiv 2405.14734, Eq. 6: scale = beta, margin = gamma) with mean log-probabilities over all
    tokens, SePO (arXiv 2408.13518: scale = gamma, margin = lambda) with means over the selected ones.

    Args:
        chosen: Log-probability of the preferred response, reduced over its tokens.
        rejected: The same of the other response.
        scale: Factor of the difference, > 0.
        margin: What the scaled difference must exceed.
    """
    return -F.logsigmoid(scale * (chosen - rejected) - margin)


def pairwise(chosen: Tensor, rejected: Tensor, *, link: Link, beta: float, margin: float = 0.0) -> Tensor:
    """``link(beta (chosen - rejected) - margin)``, any link of :mod:`tokenward.ops.links`.  [b], [b] -> [b]"""
    return link(beta * (chosen - rejected) - margin)


def odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """``-log sigma(log odds(chosen) - log odds(rejected))`` of mean log-probabilities per token.  [b], [b] -> [b]"""
    return logistic(log_odds(chosen) - log_odds(rejected))


def orpo(odds: Tensor, chosen: Tensor, *, beta: float) -> Tensor:
    """Odds ratio preference optimisation: ``beta odds - chosen``.  [b], [b] -> [b]

    Hong et al. 2024 (arXiv 2403.07691), Eq. 6.

    Args:
        odds: Of :func:`odds_ratio`.
        chosen: Mean log-probability of the preferred response's tokens.
        beta: Share of the odds; the paper's lambda.
    """
    return beta * odds - chosen


def tdpo(
    chosen: Tensor, rejected: Tensor, chosen_kl: Tensor, rejected_kl: Tensor, *, beta: float, alpha: float
) -> Tensor:
    """``-log sigma(beta (chosen - rejected - alpha (rejected_kl - chosen_kl)))``.  [b] each -> [b]

    Zeng et al. 2024 (arXiv 2404.11999); SparsePO's (arXiv 2410.05102) with masked sums and alpha 1.

    Args:
        chosen: Log-ratio of the preferred response, summed over its tokens.
        rejected: The same of the other response.
        chosen_kl: KL divergence of the preferred response, summed over its positions; detached for TDPO2.
        rejected_kl: The same of the other response.
        beta: Scale of the implicit reward, > 0.
        alpha: Scale of the divergences.
    """
    return logistic(beta * (chosen - rejected - alpha * (rejected_kl - chosen_kl)))


def mask_price(ratio: Tensor, kl: Tensor, *, l1_ratio: float, l1_kl: float) -> Tensor:
    """SparsePO's penalty of the sizes of a token's two masks (arXiv 2410.05102).  [m], [m] -> [m]"""
    return l1_ratio * ratio.abs() + l1_kl * kl.abs()


def token_margin(chosen: Tensor, rejected: Tensor, baseline: Tensor, *, beta: float) -> Tensor:
    """TBPO's ``-log R``: ``beta (chosen - rejected - baseline)`` of two tokens (arXiv 2605.12288).  [m] each -> [m]"""
    return beta * (chosen - rejected - baseline)


def pair_weight(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """``sigma(beta (rejected - chosen))``: how wrong the log-ratios order a pair.  [b], [b] -> [b]"""
    return torch.sigmoid(beta * rejected - beta * chosen)


def treg(pair_weights: Tensor, chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """``-beta s (chosen + rejected)`` with the pair's weight ``s``.  [b] each -> [b]

    T-REG's regulariser (arXiv 2412.02685).

    Args:
        pair_weights: Of :func:`pair_weight`.
        chosen: Log-probabilities of the preferred response, summed with the token rewards as signed weights.
        rejected: The same of the other response.
        beta: As in the DPO term beside it.
    """
    return -beta * pair_weights * (chosen + rejected)


def likelihood(total: Tensor, size: Tensor) -> Tensor:
    """``-total / size``: a mean negative log-probability; 0 for a size of 0, if the total is.  [b], [b] -> [b]"""
    return -total / torch.where(size != 0, size, 1.0)


def one_sample_kl(log_ratio: Tensor) -> Tensor:
    """``r - 1 - log r`` with ``r = pi / pi_ref``, an estimate of KL(ref || pi) from tokens of the reference.  [n] -> [n]

    Never negative, and 0 where the two agree (Schulman's K3). The ratio is held below ``exp(30)``.
    """
    log_ratio = log_ratio.clamp(max=30.0)
    return log_ratio.expm1() - log_ratio


def kto(
    ratio: Tensor,
    desirable: Tensor,
    anchor: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimisation of single responses: ``w (1 - sigma(+-beta (ratio - anchor)))``.  [r] each -> [r]

    Ethayarajh et al. 2024 (arXiv 2402.01306), Eq. 8; plus for desirable responses.

    Args:
        ratio: Log-ratio ``log pi - log pi_ref``, summed over the response's tokens.
        desirable: Whether the response is a good one.
        anchor: The reference point z_0, a KL divergence in nats.
        beta: Scale, > 0.
        desirable_weight: ``w`` of the good responses; the paper's lambda_D.
        undesirable_weight: ``w`` of the others; lambda_U.
    """
    gain = beta * (ratio - anchor)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    return weight * (1 - torch.where(desirable, gain, -gain).sigmoid())
