"""Link functions: from the scaled difference ``z`` of the preferred and the other side to a loss.  [...] -> [...]

``z`` is one number per pair of responses, or one per position of a pair of tokens. The Bregman family (arXiv 2605.12288)
is written with the ratio ``R = exp(-z)``: a convex generator ``h`` gives the loss ``h'(R) R - h(R) - h'(1/R)``.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Link = Callable[[Tensor], Tensor]
"""Maps margins to losses elementwise."""

LARGEST_LOG_RATIO = 30.0
"""Bregman losses are flat beyond it, as in the published code, so that R^2 stays finite in float32."""


def logistic(z: Tensor) -> Tensor:
    """``-log sigma(z) = log(1 + R)``, the loss of DPO; ``h = (R log R - (1 + R) log(1 + R)) / 2``."""
    return -F.logsigmoid(z)


def hinge(z: Tensor) -> Tensor:
    """``max(0, 1 - z)``, the loss of SLiC (arXiv 2305.10425)."""
    return torch.relu(1 - z)


def robust(z: Tensor, label_smoothing: float) -> Tensor:
    """``((1 - e) L(z) - e L(-z)) / (1 - 2 e)``, ``L = -log sigma``: unbiased under flips (arXiv 2403.00409, Eq. 12)."""
    flipped = label_smoothing * logistic(-z)
    return ((1 - label_smoothing) * logistic(z) - flipped) / (1 - 2 * label_smoothing)


def smoothed(link: Link, z: Tensor, label_smoothing: float) -> Tensor:
    """``(1 - e) L(z) + e L(-z)``: the expected loss if a share ``e`` of the labels is flipped (Mitchell's cDPO note)."""
    return (1 - label_smoothing) * link(z) + label_smoothing * link(-z) if label_smoothing else link(z)


def kliep(z: Tensor) -> Tensor:
    """``R + log R``; ``h = R log R - R``."""
    log_ratio = _log_ratio(z)
    return log_ratio.exp() + log_ratio


def lsif(z: Tensor) -> Tensor:
    """``R^2 - 2 / R``; ``h = (R - 1)^2``, without the constant -1.

    The published code has ``R^2 - 2 R`` instead, which no generator gives.
    """
    log_ratio = _log_ratio(z)
    return (2 * log_ratio).exp() - 2 * (-log_ratio).exp()


def basu(z: Tensor, power: float) -> Tensor:
    """``R^(l + 1) - (l + 1) (R^-l - 1) / l``; ``h = (R^(l + 1) - R) / l``, plus the constant 1.

    ``l`` is the paper's lambda, >= 0. The limit at ``l = 0`` is :func:`kliep`. The published code has the same gradient, but
    its constant grows without bound there.
    """
    log_ratio = _log_ratio(z)
    if power == 0:
        return log_ratio.exp() + log_ratio
    return ((power + 1) * log_ratio).exp() - (power + 1) * torch.expm1(-power * log_ratio) / power


def scaled_basu(z: Tensor, power: float, scale: float) -> Tensor:
    """:func:`basu` over ``scale (l + 1)``, which has the slope ``-2 / scale`` at ``R = 1`` for every power."""
    return basu(z, power) / (scale * (power + 1))


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for ``x < 0``, accurate at both ends (Maechler 2012).  [...] -> [...]"""
    # expm1 is accurate while exp(x) is near 1, log1p while it is small; they meet at -log 2.
    near = x > -0.6931471805599453
    # `where` differentiates both branches: the unused one gets an input with a finite gradient, or NaN would leak.
    by_expm1 = torch.log(-torch.expm1(torch.where(near, x, -0.5)))
    by_log1p = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, by_expm1, by_log1p)


def log_odds(logp: Tensor, largest: float = -1e-6) -> Tensor:
    """``log(p / (1 - p))`` of a log-probability.  [...] -> [...]"""
    logp = logp.clamp(max=largest)  # the odds stay finite at p = 1, with a gradient of 0 beyond
    return logp - log1mexp(logp)


def _log_ratio(z: Tensor) -> Tensor:
    return (-z).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
