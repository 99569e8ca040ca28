# torch leaves parts of what is used here untyped.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
"""A softmax over a vocabulary that comes in tiles: its normaliser, and means under it."""

import torch
from torch import Tensor


class TiledSums:
    """Sums over the vocabulary so far, each relative to the largest logit so far.  [n] each

    Args:
        like: Zeros of the shape and type of the sums.
    """

    def __init__(self, like: Tensor) -> None:
        self.peak = torch.full_like(like, -torch.inf)
        self.total, self.first = torch.zeros_like(like), torch.zeros_like(like)

    def add(self, logits: Tensor, values: Tensor | None) -> None:
        """One tile, and what shall be averaged over the distribution."""
        peak = torch.maximum(self.peak, logits.amax(-1))
        finite = torch.where(peak.isfinite(), peak, 0.0)
        share = (logits - finite[:, None]).exp_()
        before = (self.peak - finite).exp()
        self.total = self.total * before + share.sum(-1)
        if values is not None:
            # A probability of 0 adds nothing, also where the value is not finite.
            so_far = torch.where(before > 0, self.first * before, 0.0)
            self.first = so_far + torch.where(share > 0, values * share, 0.0).sum(-1)
        self.peak = peak

    @property
    def logsumexp(self) -> Tensor:
        """Of all logits."""
        return self.peak + self.total.log()

    @property
    def mean(self) -> Tensor:
        """Of the values, under the distribution."""
        return self.first / self.total
