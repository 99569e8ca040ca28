"""Preference losses: sequence statistics in, one loss per pair out, without reduction."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenward.ops.links import Link, log_odds, logistic


def dpo(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Direct preference optimization with label smoothing (cDPO).  [b], [b] -> [b]

    ``-(1 - e) log sigma(beta (chosen - rejected)) - e log sigma(-beta (chosen - rejected))`` of summed log-ratios
    ``log pi - log pi_ref``. Rafailov et al. 2023 (arXiv 2305.18290), Eq. 7; smoothing from Mitchell's cDPO note.
    """
    logits = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def ipo(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Identity preference optimization: ``(chosen - rejected - 1 / (2 beta))^2``.  [b], [b] -> [b]

    Azar et al. 2023 (arXiv 2310.12036), Eq. 17, with beta for the paper's tau. TRL takes mean log-ratios, which makes
    the target independent of the length.
    """
    return (chosen - rejected - 1 / (2 * beta)).square()


def margin_logistic(chosen: Tensor, rejected: Tensor, *, scale: float, margin: float = 0.0) -> Tensor:
    """Reference-free loss ``-log sigma(scale (chosen - rejected) - margin)``.  [b], [b] -> [b]

    SimPO (arXiv 2405.14734, Eq. 6: scale = beta, margin = gamma) with mean log-probabilities over all tokens, SePO
    (arXiv 2408.13518: scale = gamma, margin = lambda) with means over the selected tokens.
    """
    return -F.logsigmoid(scale * (chosen - rejected) - margin)


def pairwise(chosen: Tensor, rejected: Tensor, *, link: Link, beta: float, margin: float = 0.0) -> Tensor:
    """``link(beta (chosen - rejected) - margin)`` for a link of :mod:`tokenward.ops.links`.  [b], [b] -> [b]"""
    return link(beta * (chosen - rejected) - margin)


def odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """``-log sigma(log odds(chosen) - log odds(rejected))`` of mean log-probabilities per token.  [b], [b] -> [b]"""
    return logistic(log_odds(chosen) - log_odds(rejected))


def orpo(odds: Tensor, chosen: Tensor, *, beta: float) -> Tensor:
    """Odds ratio preference optimization: ``beta odds - chosen``.  [b], [b] -> [b]

    ``odds`` comes from :func:`odds_ratio`, ``chosen`` is the mean log-probability of the chosen response. Hong et al. 2024
    (arXiv 2403.07691), Eq. 6, with beta for the paper's lambda.
    """
    return beta * odds - chosen


def tdpo(
    chosen: Tensor, rejected: Tensor, chosen_kl: Tensor, rejected_kl: Tensor, *, beta: float, alpha: float
) -> Tensor:
    """``-log sigma(beta (chosen - rejected - alpha (rejected_kl - chosen_kl)))``.  [b] each -> [b]

    Log-ratios and KL divergences are summed over the tokens of each response; TDPO2 detaches ``chosen_kl``. Zeng et al.
    2024 (arXiv 2404.11999). With masked sums and alpha 1 it is SparsePO (arXiv 2410.05102).
    """
    return logistic(beta * (chosen - rejected - alpha * (rejected_kl - chosen_kl)))


def mask_price(ratio: Tensor, kl: Tensor, *, l1_ratio: float, l1_kl: float) -> Tensor:
    """SparsePO's L1 penalty on the two masks of each token (arXiv 2410.05102).  [m], [m] -> [m]"""
    return l1_ratio * ratio.abs() + l1_kl * kl.abs()


def token_margin(chosen: Tensor, rejected: Tensor, baseline: Tensor, *, beta: float) -> Tensor:
    """TBPO's ``-log R``: ``beta (chosen - rejected - baseline)`` per token pair (arXiv 2605.12288).  [m] each -> [m]"""
    return beta * (chosen - rejected - baseline)


def pair_weight(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """``sigma(beta (rejected - chosen))``: how wrongly the log-ratios order a pair.  [b], [b] -> [b]"""
    return torch.sigmoid(beta * rejected - beta * chosen)


def treg(pair_weights: Tensor, chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """T-REG's regularizer ``-beta s (chosen + rejected)`` (arXiv 2412.02685).  [b] each -> [b]

    ``s`` comes from :func:`pair_weight`; the others are log-probabilities summed with signed token rewards as weights.
    """
    return -beta * pair_weights * (chosen + rejected)


def likelihood(total: Tensor, size: Tensor) -> Tensor:
    """Mean negative log-likelihood ``-total / size``; ``-total`` if the size is 0.  [b], [b] -> [b]"""
    return -total / torch.where(size != 0, size, 1.0)


def one_sample_kl(log_ratio: Tensor) -> Tensor:
    """Schulman's K3 estimate ``r - 1 - log r`` of KL(ref || pi), ``r = pi / pi_ref``, from reference tokens.  [n] -> [n]

    It is never negative, and 0 if both agree.
    """
    log_ratio = log_ratio.clamp(max=30.0)  # exp stays finite in float32
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
    """Kahneman-Tversky optimization: ``w (1 - sigma(+-beta (ratio - anchor)))``, plus if desirable.  [r] each -> [r]

    ``ratio`` is the summed log-ratio ``log pi - log pi_ref``, ``anchor`` the reference point z_0, a KL divergence in nats.
    Ethayarajh et al. 2024 (arXiv 2402.01306), Eq. 8.
    """
    gain = beta * (ratio - anchor)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    return weight * (1 - torch.where(desirable, gain, -gain).sigmoid())
