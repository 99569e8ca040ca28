"""Predictions whose thresholds are set on texts without labels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.ops.classification import prior_offsets


def calibration_offsets(logp: Tensor, prior: Sequence[float] | None = None) -> Tensor:
    """What to subtract from the class log-probabilities so that their mean equals a prior.  [p n c] -> [p c]

    Prior matching: the offsets under which the mean class probabilities over the texts are the prior; see
    :func:`tokenward.ops.classification.prior_offsets`, of which Batch Calibration (arXiv 2309.17249) is the first step.
    Labels are not used, so it takes nothing from the few that there are.

    Args:
        logp: Class log-probabilities of ``n`` development texts under ``p`` prompts.
        prior: Share of each class; None for equal ones.

    Raises:
        UserError: the prior is no distribution over the classes, or there are no texts.
    """
    classes = logp.shape[-1]
    if logp.shape[1] == 0:
        raise UserError("calibration has no development texts. Give some, or report the plain accuracy only.")
    shares = [1 / classes] * classes if prior is None else list(prior)
    if len(shares) != classes or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise UserError(
            f"prior is {shares}; it must be {classes} shares above 0 that add up to 1, one per class."
        )
    wanted = torch.tensor(shares, dtype=torch.float64)
    return torch.stack([prior_offsets(values, wanted) for values in logp])
