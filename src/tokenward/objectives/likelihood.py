"""Likelihood of the best response, each token counted by its weight."""

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
    fine-tuning: the mean negative log-probability. Tied best responses count as one sequence.

    Attributes:
        normaliser: ``weights``: divide by the sum of the weights, as the paper does, so that every sequence counts
            the same and only the proportions of its weights matter. ``length``: divide by the number of tokens,
            with and without weight, so that a sequence with larger weights counts more.
    """

    needs_reference: ClassVar[bool] = False
    pairwise: ClassVar[bool] = False

    _: KW_ONLY
    normaliser: Literal["weights", "length"] = "weights"

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch; see :class:`tokenward.objectives.base.Objective`."""
        best = (batch.rank == 0)[batch.response]
        weights = torch.where(best, batch.weights, 0.0)
        owner = batch.comparison[batch.response]
        counted = weights if self.normaliser == "weights" else best.to(weights.dtype)
        total = segment_sum(counted, owner, batch.comparisons)
        nll = -weighted_sum(logp, weights, owner, batch.comparisons) / total
        return Losses(nll, {"nll": nll.detach()})


SFT = WeightedLikelihood
"""Plain supervised fine-tuning: the same with its default and weights of 1."""
