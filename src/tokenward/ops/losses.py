"""Preference losses: sequence statistics in, one loss per pair out, never reduced."""

import torch
import torch.nn.functional as F
from torch import Tensor


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


def one_sample_kl(log_ratio: Tensor) -> Tensor:
    """``r - 1 - log r`` with ``r = pi / pi_ref``, an estimate of KL(ref || pi) from tokens of the reference.  [n] -> [n]

    Never negative, and 0 where the two agree (Schulman's K3). The ratio is held below ``exp(30)``.
    """
    log_ratio = log_ratio.clamp(max=30.0)
    return log_ratio.expm1() - log_ratio


def kto(ratio: Tensor, desirable: Tensor, anchor: Tensor, *, beta: float) -> Tensor:
    """Kahneman-Tversky optimisation of single responses: ``1 - sigma(+-beta (ratio - anchor))``.  [r] each -> [r]

    Ethayarajh et al. 2024 (arXiv 2402.01306), Eq. 8; plus for desirable responses.

    Args:
        ratio: Log-ratio ``log pi - log pi_ref``, summed over the response's tokens.
        desirable: Whether the response is a good one.
        anchor: The reference point z_0, a KL divergence in nats.
        beta: Scale, > 0.
    """
    gain = beta * (ratio - anchor)
    return 1 - torch.where(desirable, gain, -gain).sigmoid()
