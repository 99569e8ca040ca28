# torch leaves parts of what is used here untyped.
# pyright: reportUnknownMemberType=false
"""How well class probabilities fit their labels: the gap reward of prompt search, and calibrated predictions."""

import torch
from torch import Tensor


def label_gap(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Probability of the label minus the highest of the other labels.  [... x c], [x] -> [... x]

    The others are told apart by their index, so that an exact tie is a gap of 0. The published code of TLM
    looks for another probability instead: of two classes at 0.5 each it then finds no rival and pays 1.5.

    Args:
        probabilities: Of ``c`` >= 2 classes for each example.
        labels: Index of the right class of each example.
    """
    index = labels.expand(probabilities.shape[:-1])[..., None]
    own = probabilities.gather(-1, index).squeeze(-1)
    return own - probabilities.scatter(-1, index, -torch.inf).amax(-1)


def piecewise_gap(gap: Tensor, *, correct: float, wrong: float) -> Tensor:
    """Gap scaled by another factor on either side of 0.  [...] -> [...]

    RLPrompt's reward (Deng et al. 2022, arXiv 2205.12548), which TLM (arXiv 2306.00398) keeps as the preference
    of its prompt task, with ``correct`` = 200 and ``wrong`` = 180.

    Args:
        gap: What :func:`label_gap` gives, in [-1, 1].
        correct: Factor where the gap is positive.
        wrong: Factor where it is not.
    """
    return torch.where(gap > 0, correct, wrong) * gap


def predictions(logp: Tensor, offsets: Tensor | None = None) -> Tensor:
    """The most probable class after subtracting an offset from each; the first of equal ones.  [... c], [c] -> [...]"""
    return (logp if offsets is None else logp - offsets).argmax(-1)


def prior_offsets(logp: Tensor, prior: Tensor, *, iterations: int = 500) -> Tensor:
    """Offsets under which the mean class probabilities equal the prior.  [n c], [c] -> [c] float64

    Solves ``mean_n softmax(logp - offset) = prior`` by ``offset += log(mean / prior)``, Sinkhorn's fixed point: the
    problem is convex, so the offsets are the only ones up to a constant, here such that their mean is 0. The
    first step from 0 with a uniform prior is Batch Calibration (Zhou et al. 2024, arXiv 2309.17249, Eq. 4), which
    stops there and so does not reach the prior.

    Args:
        logp: Log-probabilities of the classes on texts whose labels need not be known.
        prior: Share of each class, > 0, sum 1.
        iterations: Steps; the error shrinks by a factor with each.
    """
    logp, log_prior = logp.double(), prior.double().log()
    log_count = torch.tensor(float(len(logp)), dtype=torch.float64, device=logp.device).log()
    offsets = torch.zeros_like(log_prior)
    for _ in range(iterations):
        mean = (logp - offsets).log_softmax(-1).logsumexp(0) - log_count
        offsets = offsets + mean - log_prior
    return offsets - offsets.mean()
