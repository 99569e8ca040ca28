"""Objectives over pairs with terms per token: TDPO, TBPO, SparsePO and MaPO."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tokenward.errors import UserError
from tokenward.objectives.base import Losses, ObjectiveModule
from tokenward.objectives.pairwise import (
    Link,
    LinkName,
    PairSides,
    divergences,
    kl_metrics,
    log_ratios,
    logp_metrics,
    reward_metrics,
    sides,
    sums,
)
from tokenward.ops.losses import mask_price, one_sample_kl, tdpo, token_margin
from tokenward.ops.ragged import Aligned, aligned, segment_sum, weighted_mean
from tokenward.plugins import check_positive, validated
from tokenward.tokens.batches import Needs, TokenBatch
from tokenward.trl_names import answers_trl


@answers_trl
@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class TDPO:
    """Token-level direct preference optimisation (arXiv 2404.11999): DPO with the KL divergence of each response.

    ``-log sigma(beta (u_w - u_l - alpha (D_l - D_w)))`` with ``u`` the summed log-ratios and ``D`` the KL divergences
    KL(reference || policy) over the whole vocabulary, summed over the response's positions.

    Attributes:
        beta: Scale of the implicit reward.
        version: 1 (TDPO1): alpha is 1 and both divergences have a gradient. 2 (TDPO2, the default): the chosen response's
            divergence has none.
        alpha: Factor of the divergences in version 2, by default 0.5; with 0 it is DPO. It may be negative.
        direction: ``forward`` as above, or ``reverse``: KL(policy || reference).
        stop_gradient: For version 2: ``chosen``, or ``none`` to give both a gradient. The term of TIS-DPO is
            ``alpha: -0.5, direction: reverse, stop_gradient: none``.
        profile: ``official`` is version 1, which the published configuration trains, contrary to the default of its code.
    """

    beta: float = 0.1
    version: Literal[1, 2] | None = None
    alpha: float | None = None
    direction: Literal["forward", "reverse"] = "forward"
    stop_gradient: Literal["chosen", "none"] | None = None
    profile: Literal["official"] | None = None

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)
        if self.profile == "official" and (self.version is not None or self.direction != "forward"):
            raise UserError(
                "profile: official fixes version 1 and direction forward, as in the published configuration. Leave the two "
                "out, or leave the profile out.",
                code="conflicting-settings",
            )
        if self._version == 1 and (self.alpha is not None or self.stop_gradient is not None):
            raise UserError(
                "version 1 of TDPO has alpha 1 and stops no gradient. Leave alpha and stop_gradient out, or write version: 2.",
                code="conflicting-settings",
            )

    @property
    def needs(self) -> Needs:
        return Needs(reference=True, kl=self.direction, pairwise=True)

    @property
    def _version(self) -> int:
        return 1 if self.profile == "official" else self.version or 2

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        ratio, kl = sides(sums(log_ratios(logp, batch), batch)), sides(divergences(batch))
        alpha, chosen = 1.0, kl.chosen
        if self._version == 2:
            alpha = 0.5 if self.alpha is None else self.alpha
            chosen = chosen if self.stop_gradient == "none" else chosen.detach()
        loss = tdpo(*ratio, chosen, kl.rejected, beta=self.beta, alpha=alpha)
        rewards = reward_metrics(self.beta * ratio.chosen, self.beta * ratio.rejected)
        return Losses(loss, rewards | kl_metrics(batch) | logp_metrics(logp, batch))


@dataclass(kw_only=True)
@validated
class TBPO:
    """Token-level Bregman preference optimisation (arXiv 2605.12288), also called TokenRatio.

    The mean over positions ``t`` of ``link(-log R_t)`` with ``log R_t = beta (delta_t^l - delta_t^w + b_t)``, where
    ``delta`` is the log-ratio of a token and ``t`` counts the tokens with weight up to the shorter response. The baseline
    ``b_t`` is the difference of the two states' KL divergences (variant A) or of the values of a head (variant Q).

    Attributes:
        beta: Scale.
        link: See :class:`tokenward.objectives.pairwise.Link`; with ``logistic`` and one token per response it is DPO.
        power: Lambda of ``ba`` and ``sba``.
        scale: Scale s of ``sba``.
        label_smoothing: Assumed share of flipped labels.
        baseline: ``kl``: KL(reference || policy) over the whole vocabulary, as in the published code of variant A.
            ``sample``: its one-sample estimate ``r - 1 - log r`` at the token, as in the paper, which needs no reference
            model during training. ``head``: variant Q, a network on the policy's hidden states, which get no gradient from
            it. ``none``: 0.
        hidden: Width of the head's hidden layer; None makes it one linear layer.
        centre: Subtract the mean over the pair's positions from the differences of the head.
        clamp: Limit of their absolute value; None is no limit.
        learning_rate: Learning rate of the head; None is the policy's.
        weight_decay: Weight decay of the head.
        profile: ``official`` is variant Q of the published code: a linear head, centred and limited to 10.
    """

    beta: float = 0.1
    link: LinkName = "sba"
    power: float = 0.0
    scale: float = 4.0
    label_smoothing: float = 0.0
    baseline: Literal["kl", "sample", "head", "none"] = "kl"
    hidden: int | None = 1024
    centre: bool = False
    clamp: float | None = None
    learning_rate: float | None = 1e-3
    weight_decay: float = 0.0
    profile: Literal["official"] | None = None

    def __post_init__(self) -> None:
        self._head: nn.Module | None = None  # not a setting, so not a field
        check_positive(beta=self.beta)
        self._link()
        settings = (self.baseline, self.hidden, self.centre, self.clamp)
        if self.profile == "official" and settings != ("head", 1024, False, None):
            raise UserError(
                "profile: official is variant Q with a linear head, centred and limited to 10, as in the published code. "
                "Write baseline: head and leave hidden, centre and clamp out, or leave the profile out.",
                code="conflicting-settings",
            )

    @property
    def needs(self) -> Needs:
        kl = "forward" if self.baseline == "kl" else None
        return Needs(reference=True, kl=kl, states=self.baseline == "head", pairwise=True)

    def make_module(self, width: int, layers: int) -> ObjectiveModule | None:
        """The head of variant Q."""
        if self.baseline != "head":
            return None
        hidden = None if self.profile == "official" else self.hidden
        if hidden is None:
            self._head = nn.Linear(width, 1)
        else:
            self._head = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        return ObjectiveModule(self._head, self.learning_rate, self.weight_decay)

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        pairs, delta = aligned(batch.kept, batch.response, batch.responses), log_ratios(logp, batch)
        baseline = self._baseline(delta, pairs, batch)
        margin = token_margin(delta[pairs.chosen], delta[pairs.rejected], baseline, beta=self.beta)
        weights = batch.weights[pairs.chosen] * batch.weights[pairs.rejected]
        mean = (weights, pairs.pair, batch.comparisons)
        loss = weighted_mean(self._link()(margin), *mean)
        rewards = reward_metrics(*sides(self.beta * sums(delta, batch)))
        metrics = {
            "margins/position": weighted_mean(margin.detach(), *mean),
            "margins/baseline": weighted_mean(baseline.detach(), *mean),
        }
        return Losses(loss, rewards | metrics | logp_metrics(logp, batch))

    def _link(self) -> Link:
        return Link(name=self.link, label_smoothing=self.label_smoothing, power=self.power, scale=self.scale)

    def _baseline(self, delta: Tensor, pairs: Aligned, batch: TokenBatch) -> Tensor:
        """``b_t``: by how much the rejected response's state is ahead of the chosen one's.  -> [m]"""
        if self.baseline == "kl":
            kl = batch.statistics["kl"]
            return kl[pairs.rejected] - kl[pairs.chosen]
        if self.baseline == "sample":
            return one_sample_kl(delta[pairs.rejected]) - one_sample_kl(delta[pairs.chosen])
        if self.baseline == "none":
            return torch.zeros_like(delta[pairs.chosen])
        return self._head_difference(pairs, batch)

    def _head_difference(self, pairs: Aligned, batch: TokenBatch) -> Tensor:
        assert self._head is not None
        centre, clamp = (True, 10.0) if self.profile == "official" else (self.centre, self.clamp)
        chosen, rejected = (
            _apply(self._head, batch.statistics["states"][index].detach()).squeeze(-1)
            for index in (pairs.chosen, pairs.rejected)
        )
        difference = rejected - chosen
        if centre:
            mean = weighted_mean(difference, torch.ones_like(difference), pairs.pair, batch.comparisons)
            difference = difference - mean[pairs.pair]
        return difference if clamp is None else difference.clamp(-clamp, clamp)


def _apply(module: nn.Module, states: Tensor) -> Tensor:
    """Call a module in its own precision, whatever autocast says."""
    with torch.autocast(states.device.type, enabled=False):
        return module(states.to(next(module.parameters()).dtype))


class LayerMask(nn.Module):
    """A mask >= 0 from the layers of a model: one feature per layer, and a learnt combination of them."""

    def __init__(self, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.features = nn.ModuleList(nn.Linear(width, 1) for _ in range(layers))
        self.mixer = nn.Linear(layers, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            # The features are >= 0: with random signs, about half of all masks would start at 0 and never get a gradient.
            self.mixer.weight.abs_()

    def forward(self, layers: Tensor) -> Tensor:
        """Masks of positions.  [m L d] -> [m]"""
        normed = self.norm(layers)
        features = torch.cat([layer(normed[:, place]) for place, layer in enumerate(self.features)], -1)
        mixed = self.mixer(self.dropout(torch.relu(features)))
        return self.dropout(torch.relu(mixed)).squeeze(-1)


@dataclass(kw_only=True)
@validated
class SparsePO:
    """SparsePO and MaPO (arXiv 2410.05102): TDPO1 with masks for each token's log-ratio and KL divergence.

    ``-log sigma(beta (u_w - u_l - (d_l - d_w)))`` plus the price of the masks, with ``u = sum_t m_u(t) delta_t`` and
    ``d = sum_t m_d(t) KL_t(reference || policy)``.

    Attributes:
        beta: Scale of the implicit reward.
        masks: ``common``: one network gives the same mask for both. ``independent``: two networks. ``weights``: the
            weights of the tokens, as in MaPO.
        l1_ratio: Price of the log-ratios' mask, summed over the tokens of both responses; halved for ``common``.
        l1_kl: Price of the KL divergences' mask, likewise.
        mask_ratio: Whether log-ratios have a mask.
        mask_kl: Whether KL divergences have a mask.
        dropout: Dropout of the networks; 0.01 in the published code.
        learning_rate: Learning rate of the networks; None is the policy's.
        weight_decay: Weight decay of the networks.
    """

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
        self._networks: nn.ModuleList | None = None  # not a setting, so not a field
        check_positive(beta=self.beta)
        if not (self.l1_ratio >= 0 and self.l1_kl >= 0 and 0 <= self.dropout < 1):
            raise UserError(
                f"the masks need l1_ratio and l1_kl of 0 or more and dropout in [0, 1), got {self.l1_ratio}, {self.l1_kl} and "
                f"{self.dropout}.",
                code="out-of-range",
            )

    @property
    def needs(self) -> Needs:
        return Needs(reference=True, kl="forward", reference_layers=self.masks != "weights", pairwise=True)

    def make_module(self, width: int, layers: int) -> ObjectiveModule | None:
        """The networks of learnt masks."""
        if self.masks == "weights":
            return None
        count = 1 if self.masks == "common" else 2
        self._networks = nn.ModuleList(LayerMask(width, layers, self.dropout) for _ in range(count))
        return ObjectiveModule(self._networks, self.learning_rate, self.weight_decay)

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        keep, weights = batch.kept, batch.weights[batch.kept]
        ratio_mask, kl_mask = self._masks(batch)
        ratio = self._sums(ratio_mask * weights * log_ratios(logp, batch)[keep], batch)
        kl = self._sums(kl_mask * weights.abs() * batch.statistics["kl"][keep], batch)
        half = 0.5 if self.masks == "common" else 1.0
        price = half * mask_price(ratio_mask, kl_mask, l1_ratio=self.l1_ratio, l1_kl=self.l1_kl)
        prices = self._sums(price, batch)
        loss = tdpo(*ratio, *kl, beta=self.beta, alpha=1.0) + prices.chosen + prices.rejected
        rewards = reward_metrics(self.beta * ratio.chosen, self.beta * ratio.rejected)
        shown = {"masks/ratio": self._mean(ratio_mask, batch), "masks/kl": self._mean(kl_mask, batch)}
        return Losses(loss, rewards | shown | kl_metrics(batch) | logp_metrics(logp, batch))

    def _masks(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Masks of the log-ratio and of the KL divergence of each token with weight.  -> [m], [m]"""
        ones = torch.ones_like(batch.weights[batch.kept])
        if self.masks == "weights":
            return ones, ones
        assert self._networks is not None
        layers = batch.statistics["reference_layers"][batch.kept]
        masks = [_apply(network, layers) for network in self._networks]
        return masks[0] if self.mask_ratio else ones, masks[-1] if self.mask_kl else ones

    def _sums(self, values: Tensor, batch: TokenBatch) -> PairSides:
        return sides(segment_sum(values, batch.response[batch.kept], batch.responses))

    def _mean(self, masks: Tensor, batch: TokenBatch) -> Tensor:
        """Mean over the tokens with weight of both responses.  [m] -> [b]"""
        owner = batch.comparison[batch.response[batch.kept]]
        count = segment_sum(torch.ones_like(masks), owner, batch.comparisons).clamp(min=1)
        return segment_sum(masks.detach(), owner, batch.comparisons) / count
