"""DPO with a mask for each token's log-ratio and another for its KL divergence: SparsePO and MaPO."""

from dataclasses import KW_ONLY, dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from tokenward.errors import UserError
from tokenward.objectives.base import Losses, ObjectiveModule
from tokenward.objectives.pairs import (
    PairSides,
    kl_metrics,
    log_ratios,
    logp_metrics,
    positive,
    reward_metrics,
    sides,
)
from tokenward.objectives.tbpo import states_through
from tokenward.ops.losses import mask_price, tdpo
from tokenward.ops.ragged import segment_sum
from tokenward.tokens.batches import TokenBatch
from tokenward.tokens.needs import Needs


class Masks(NamedTuple):
    """What each token with weight counts.  [m] each

    Attributes:
        ratio: Of its log-ratio.
        kl: Of its KL divergence.
    """

    ratio: Tensor
    kl: Tensor


class LayerMask(nn.Module):
    """A number of 0 or more from the layers of a model: one feature of each layer, and a learnt mix of them.

    Args:
        width: Of the layers.
        layers: How many.
        dropout: Of the features and of the mask.
    """

    def __init__(self, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.features = nn.ModuleList(nn.Linear(width, 1) for _ in range(layers))
        self.mixer = nn.Linear(layers, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            # Features are 0 or more: with signs at random, about half of all masks would begin at 0 and stay there.
            self.mixer.weight.abs_()

    def forward(self, layers: Tensor) -> Tensor:
        """Masks of positions.  [m L d] -> [m]"""
        normed = self.norm(layers)
        features = torch.cat([layer(normed[:, place]) for place, layer in enumerate(self.features)], -1)
        mixed = self.mixer(self.dropout(torch.relu(features)))
        return self.dropout(torch.relu(mixed)).squeeze(-1)


@dataclass
class SparsePO:
    """SparsePO and MaPO (arXiv 2410.05102): TDPO1 with a mask for each token's log-ratio and for its KL divergence.

    ``-log sigma(beta (u_w - u_l - (d_l - d_w)))`` plus the masks' sizes, with ``u = sum_t m_u(t) delta_t`` and
    ``d = sum_t m_d(t) KL_t(reference || policy)``.

    Attributes:
        beta: Scale of the implicit reward.
        masks: ``common``: one network, the same mask for both; ``independent``: two networks; ``weights``: the
            token's own weights, as MaPO has them of activations.
        l1_ratio: Price of the mask of the log-ratios, summed over both responses' tokens; halved where common.
        l1_kl: The same of the KL divergences' mask.
        mask_ratio: Whether log-ratios have a mask.
        mask_kl: Whether KL divergences have one.
        dropout: Of the networks; 0.01 in the published code.
        learning_rate: Of the networks; null is the policy's.
        weight_decay: Of the networks.
    """

    _: KW_ONLY
    beta: float = 0.1
    masks: Literal["common", "independent", "weights"] = "common"
    l1_ratio: float = 0.0
    l1_kl: float = 0.0
    mask_ratio: bool = True
    mask_kl: bool = True
    dropout: float = 0.0
    learning_rate: float | None = None
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        self._networks: nn.ModuleList | None = None  # no setting, so no field
        positive("beta", self.beta, 0.1)
        if not (self.l1_ratio >= 0 and self.l1_kl >= 0 and 0 <= self.dropout < 1):
            raise UserError(
                f"the masks need l1_ratio and l1_kl of 0 or more and dropout in [0, 1), got {self.l1_ratio}, {self.l1_kl} and "
                f"{self.dropout}. Write l1_ratio: 0.0, l1_kl: 0.0, dropout: 0.0."
            )

    @property
    def needs(self) -> Needs:
        """Learnt masks are made of the reference's layers."""
        return Needs(reference=True, kl="forward", reference_layers=self.masks != "weights", pairwise=True)

    def make_module(self, width: int, layers: int) -> ObjectiveModule | None:
        """The networks of learnt masks; see :class:`tokenward.objectives.base.Objective`."""
        if self.masks == "weights":
            return None
        count = 1 if self.masks == "common" else 2
        self._networks = nn.ModuleList(LayerMask(width, layers, self.dropout) for _ in range(count))
        return ObjectiveModule(self._networks, self.learning_rate, self.weight_decay)

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch of pairs; see :class:`tokenward.objectives.base.Objective`."""
        keep, weights = batch.kept, batch.weights[batch.kept]
        masks = self._masks(batch)
        ratio = self._sums(masks.ratio * weights * log_ratios(logp, batch)[keep], batch)
        kl = self._sums(masks.kl * weights.abs() * batch.statistics["kl"][keep], batch)
        half = 0.5 if self.masks == "common" else 1.0
        price = half * mask_price(*masks, l1_ratio=self.l1_ratio, l1_kl=self.l1_kl)
        paid = self._sums(price, batch)
        loss = tdpo(*ratio, *kl, beta=self.beta, alpha=1.0) + paid.chosen + paid.rejected
        rewards = reward_metrics(PairSides(self.beta * ratio.chosen, self.beta * ratio.rejected))
        shown = {"masks/ratio": self._mean(masks.ratio, batch), "masks/kl": self._mean(masks.kl, batch)}
        return Losses(loss, rewards | shown | kl_metrics(batch) | logp_metrics(logp, batch))

    def _masks(self, batch: TokenBatch) -> Masks:
        ones = torch.ones_like(batch.weights[batch.kept])
        if self.masks == "weights":
            return Masks(ones, ones)
        assert self._networks is not None
        layers = batch.statistics["reference_layers"][batch.kept]
        made = [states_through(network, layers) for network in self._networks]
        return Masks(made[0] if self.mask_ratio else ones, made[-1] if self.mask_kl else ones)

    def _sums(self, values: Tensor, batch: TokenBatch) -> PairSides:
        return sides(segment_sum(values, batch.response[batch.kept], batch.responses))

    def _mean(self, masks: Tensor, batch: TokenBatch) -> Tensor:
        """Over the tokens of both responses that have weight.  [m] -> [b]"""
        owner = batch.comparison[batch.response[batch.kept]]
        count = segment_sum(torch.ones_like(masks), owner, batch.comparisons).clamp(min=1)
        return segment_sum(masks.detach(), owner, batch.comparisons) / count
