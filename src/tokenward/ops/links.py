"""Links: from the margin by which the preferred side leads to a loss.  [...] -> [...]

Each is a function of ``z``, the scaled difference of the two sides; of a pair of responses it is one number, of a
pair of tokens one per position. The Bregman family (arXiv 2605.12288) is written with the ratio ``R = exp(-z)``: a
convex generator ``h`` gives ``h'(R) R - h(R) - h'(1/R)``.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Link = Callable[[Tensor], Tensor]
"""From margins to losses, elementwise."""

LARGEST_LOG_RATIO = 30.0
"""Beyond it a Bregman loss is flat, as in the published code: R^2 stays within float32."""


def logistic(z: Tensor) -> Tensor:
    """``-log sigma(z) = log(1 + R)``, the loss of DPO; the identity of ``h = (R log R - (1 + R) log(1 + R)) / 2``."""
    return -F.logsigmoid(z)


def hinge(z: Tensor) -> Tensor:
    """``max(0, 1 - z)``: SLiC's (arXiv 2305.10425)."""
    return torch.relu(1 - z)


def robust(z: Tensor, label_smoothing: float) -> Tensor:
    """``((1 - e) L(z) - e L(-z)) / (1 - 2 e)`` with ``L = -log sigma``: unbiased under flips (arXiv 2403.00409, Eq. 12)."""
    flipped = label_smoothing * logistic(-z)
    return ((1 - label_smoothing) * logistic(z) - flipped) / (1 - 2 * label_smoothing)


def smoothed(link: Link, z: Tensor, label_smoothing: float) -> Tensor:
    """``(1 - e) L(z) + e L(-z)``: the loss if a share ``e`` of the labels is flipped (Mitchell's cDPO note)."""
    return (1 - label_smoothing) * link(z) + label_smoothing * link(-z) if label_smoothing else link(z)


def kliep(z: Tensor) -> Tensor:
    """``R + log R``: the identity of ``h = R log R - R``."""
    log_ratio = _log_ratio(z)
    return log_ratio.exp() + log_ratio


def lsif(z: Tensor) -> Tensor:
    """``R^2 - 2 / R``: the identity of ``h = (R - 1)^2``, less the constant -1.

    The published code has ``R^2 - 2 R`` in its place, which is no value of the identity.
    """
    log_ratio = _log_ratio(z)
    return (2 * log_ratio).exp() - 2 * (-log_ratio).exp()


def basu(z: Tensor, power: float) -> Tensor:
    """``R^(l + 1) - (l + 1) (R^-l - 1) / l``: the identity of ``h = (R^(l + 1) - R) / l``, plus the constant 1.

    At ``l = 0`` it is :func:`kliep`, the limit; the published code's constant grows without bound there, and
    its gradient is this one's.

    Args:
        z: The margin.
        power: ``l``, the paper's lambda, 0 or more.
    """
    log_ratio = _log_ratio(z)
    if power == 0:
        return log_ratio.exp() + log_ratio
    return ((power + 1) * log_ratio).exp() - (power + 1) * torch.expm1(-power * log_ratio) / power


def scaled_basu(z: Tensor, power: float, scale: float) -> Tensor:
    """:func:`basu` over ``scale (l + 1)``: its slope at ``R = 1`` is ``-2 / scale`` whatever the power."""
    return basu(z, power) / (scale * (power + 1))


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for ``x < 0``, without loss of digits at either end.  [...] -> [...]

    Maechler 2012: by expm1 where ``exp(x)`` is near 1, by log1p where it is small.
    """
    near = x > -0.6931471805599453
    # The branch that is not taken must have a finite gradient too.
    by_expm1 = torch.log(-torch.expm1(torch.where(near, x, -0.5)))
    by_log1p = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, by_expm1, by_log1p)


def log_odds(logp: Tensor, largest: float = -1e-6) -> Tensor:
    """``log(p / (1 - p))`` of a probability given by its logarithm; finite at ``p = 1``.  [...] -> [...]

    Args:
        logp: Log-probabilities.
        largest: What they are cut off at, with a gradient of 0 beyond it.
    """
    logp = logp.clamp(max=largest)
    return logp - log1mexp(logp)


def _log_ratio(z: Tensor) -> Tensor:
    return (-z).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
