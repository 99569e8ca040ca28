"""Responses that are good or bad by themselves: KTO."""

from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.objectives.base import Losses
from tokenward.objectives.pairs import divergences, log_ratios, positive, sums
from tokenward.ops.losses import kto
from tokenward.ops.ragged import segment_sum, weighted_mean
from tokenward.tokens.batches import TokenBatch
from tokenward.tokens.needs import Needs


@dataclass(frozen=True, slots=True)
class KTO:
    """Kahneman-Tversky optimisation (arXiv 2402.01306): each response by itself, the best of a comparison desirable.

    A comparison may have one response, which is good or bad.

    The mean over a comparison's responses of ``w (1 - sigma(beta (u - z)))``, of the others with the sign turned
    round, ``u`` the summed log-ratio. The reference point ``z`` has no gradient.

    Attributes:
        beta: Scale of the implicit reward.
        desirable: Weight of the good responses; the paper's lambda_D.
        undesirable: Weight of the others; lambda_U.
        anchor: ``kl``: z is KL(policy || reference) at the comparison's own responses, over the whole vocabulary,
            their mean. ``zero``: z is 0, and no reference model is needed beside the policy. The paper takes
            mismatched prompts and responses of the batch, so that its loss depends on how a batch is cut.
    """

    _: KW_ONLY
    beta: float = 0.1
    desirable: float = 1.0
    undesirable: float = 1.0
    anchor: Literal["kl", "zero"] = "kl"

    def __post_init__(self) -> None:
        positive("beta", self.beta, 0.1)
        if not (self.desirable >= 0 and self.undesirable >= 0 and self.desirable + self.undesirable > 0):
            raise UserError(
                f"desirable and undesirable must be 0 or more and not both 0, got {self.desirable} and {self.undesirable}. "
                "Write desirable: 1.0, undesirable: 1.0."
            )

    @property
    def needs(self) -> Needs:
        """The reference point may be a divergence."""
        return Needs(reference=True, kl="reverse" if self.anchor == "kl" else None, unpaired="all")

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch; see :class:`tokenward.objectives.base.Objective`."""
        ratio, good = sums(log_ratios(logp, batch), batch), batch.rank == 0
        anchor = self._anchor(ratio, batch)
        found = kto(
            ratio,
            good,
            anchor[batch.comparison],
            beta=self.beta,
            desirable_weight=self.desirable,
            undesirable_weight=self.undesirable,
        )
        reward = self.beta * ratio.detach()
        metrics = {
            "rewards/chosen": self._mean(reward, good, batch),
            "rewards/rejected": self._mean(reward, ~good, batch),
            "kl": anchor,
        }
        having = {
            f"rewards/{side}": segment_sum(some.to(reward.dtype), batch.comparison, batch.comparisons).clamp(
                max=1
            )
            for side, some in (("chosen", good), ("rejected", ~good))
        }
        return Losses(self._mean(found, torch.ones_like(good), batch), metrics, having=having)

    def _anchor(self, ratio: Tensor, batch: TokenBatch) -> Tensor:
        """The reference point of each comparison.  -> [b]"""
        if self.anchor == "zero":
            return ratio.new_zeros(batch.comparisons)
        found = divergences(batch).detach().to(ratio.dtype)
        return self._mean(found, torch.ones_like(batch.rank, dtype=torch.bool), batch).clamp(min=0)

    def _mean(self, values: Tensor, among: Tensor, batch: TokenBatch) -> Tensor:
        """Over some of a comparison's responses; 0 where there is none of them.  [r] -> [b]"""
        flags = among.to(values.dtype)
        some = segment_sum(flags, batch.comparison, batch.comparisons) != 0
        return torch.where(some, weighted_mean(values, flags, batch.comparison, batch.comparisons), 0.0)
