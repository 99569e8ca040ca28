# torch leaves parts of what is used here untyped.
# pyright: reportUnknownMemberType=false
"""Rewards and calibration of class probabilities, for prompt search."""

import torch
from torch import Tensor


def label_gap(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Probability of the label minus the highest probability of another class.  [... x c], [x] -> [... x]

    Other classes are found by index, so an exact tie has a gap of 0. The published code of TLM looks for a different
    probability instead: for two classes at 0.5 each it finds no rival and pays 1.5.
    """
    index = labels.expand(probabilities.shape[:-1])[..., None]
    own = probabilities.gather(-1, index).squeeze(-1)
    return own - probabilities.scatter(-1, index, -torch.inf).amax(-1)


def piecewise_gap(gap: Tensor, *, correct: float, wrong: float) -> Tensor:
    """Scale the gap by ``correct`` if it is positive, else by ``wrong``.  [...] -> [...]

    The reward of RLPrompt (Deng et al. 2022, arXiv 2205.12548) with 200 and 180, which TLM (arXiv 2306.00398) uses as the
    preference of its prompt task.
    """
    return torch.where(gap > 0, correct, wrong) * gap


def predictions(logp: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Most probable class after subtracting an offset per class; the first one wins a tie.  [... c], [c] -> [...]"""
    return (logp if offsets is None else logp - offsets).argmax(-1)


def prior_offsets(logp: Tensor, prior: Tensor, *, iterations: int = 500) -> Tensor:
    """Offsets that make the mean class probabilities equal the prior.  [n c], [c] -> [c] float64

    Solves ``mean_n softmax(logp - offset) = prior`` with Sinkhorn's fixed-point step ``offset += log(mean / prior)``. The
    problem is convex, so the offsets are unique up to a constant; the result has mean 0. The first step from 0 with a
    uniform prior is Batch Calibration (Zhou et al. 2024, arXiv 2309.17249, Eq. 4), which stops there and does not reach
    the prior.
    """
    logp, log_prior = logp.double(), prior.double().log()
    log_count = torch.tensor(float(len(logp)), dtype=torch.float64, device=logp.device).log()
    offsets = torch.zeros_like(log_prior)
    for _ in range(iterations):
        mean = (logp - offsets).log_softmax(-1).logsumexp(0) - log_count
        offsets = offsets + mean - log_prior
    return offsets - offsets.mean()
