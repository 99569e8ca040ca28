"""Likelihood of responses, each token counted by its weight."""

from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenward.objectives.base import Losses
from tokenward.ops.losses import likelihood
from tokenward.ops.ragged import segment_sum, weighted_sum
from tokenward.tokens.batches import TokenBatch
from tokenward.tokens.needs import Needs


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
            ``step_weights`` and ``step_length``: divide by the sum of the weights' sizes, or by the number of tokens,
            of the whole optimizer step, so that every weight, or token, of the step counts the same: the loss of
            Rho-1 (arXiv 2404.07965), and of TOSS (arXiv 2603.01185).
        sides: ``best`` responses, or ``both``: every response of the comparison.
    """

    _: KW_ONLY
    normaliser: Literal["weights", "length", "none", "step_weights", "step_length"] = "weights"
    sides: Literal["best", "both"] = "best"

    @property
    def needs(self) -> Needs:
        """A bad response alone has no part in the likelihood of the best ones."""
        whole_step = self.normaliser.startswith("step_")
        return Needs(own_denominator=whole_step, unpaired="all" if self.sides == "both" else "good")

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch; see :class:`tokenward.objectives.base.Objective`."""
        counts = (batch.rank == 0)[batch.response] | (self.sides == "both")
        weights = torch.where(counts, batch.weights, 0.0)
        owner = batch.comparison[batch.response]
        total = weighted_sum(logp, weights, owner, batch.comparisons)
        if self.normaliser == "none":
            return Losses(-total, {"nll": -total.detach()})
        counted = weights.abs() if self.normaliser.endswith("weights") else counts.to(weights.dtype)
        size = segment_sum(counted, owner, batch.comparisons)
        mean = likelihood(total, size)
        if self.needs.own_denominator:
            return Losses(-total, {"nll": mean.detach()}, size)
        return Losses(mean, {"nll": mean.detach()})


SFT = WeightedLikelihood
"""Plain supervised fine-tuning: the same with its default and weights of 1."""
