"""Likelihood of responses, each token counted by its weight."""

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tokenward.objectives.base import Losses
from tokenward.ops.ragged import segment_sum, weighted_sum
from tokenward.tokens.rows import TokenBatch


@dataclass(frozen=True, slots=True)
class WeightedLikelihood:
    """Reward-weighted maximum likelihood of the best response (TLM, arXiv 2306.00398, with supervised data).

    ``-sum_t w_t log pi(y_t | s_t)`` with ``w_t = r_t / sum_t' r_t'``. With weights of 1 it is plain supervised
    fine-tuning: the mean negative log-probability. Tied best responses count as one sequence. A negative weight makes
    its token less likely. A comparison of which nothing has weight costs 0.

    Attributes:
        normaliser: ``weights``: divide by the sum of the weights' sizes, as the paper does, so that every sequence
            counts the same and only the proportions of its weights matter. ``length``: divide by the number of tokens,
            with and without weight, so that a sequence with larger weights counts more. ``none``: the sum.
        sides: ``best`` responses, or ``both``: every response of the comparison.
    """

    needs_reference: ClassVar[bool] = False
    pairwise: ClassVar[bool] = False

    _: KW_ONLY
    normaliser: Literal["weights", "length", "none"] = "weights"
    sides: Literal["best", "both"] = "best"

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch; see :class:`tokenward.objectives.base.Objective`."""
        counts = (batch.rank == 0)[batch.response] | (self.sides == "both")
        weights = torch.where(counts, batch.weights, 0.0)
        owner = batch.comparison[batch.response]
        nll = -weighted_sum(logp, weights, owner, batch.comparisons)
        if self.normaliser != "none":
            counted = weights.abs() if self.normaliser == "weights" else counts.to(weights.dtype)
            total = segment_sum(counted, owner, batch.comparisons)
            nll = nll / torch.where(total != 0, total, 1.0)
        return Losses(nll, {"nll": nll.detach()})


SFT = WeightedLikelihood
"""Plain supervised fine-tuning: the same with its default and weights of 1."""
