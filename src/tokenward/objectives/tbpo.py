"""Pairs of tokens at the same position of two responses: TBPO."""

from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tokenward.errors import UserError
from tokenward.objectives.base import Losses, ObjectiveModule
from tokenward.objectives.pairs import (
    Link,
    LinkName,
    log_ratios,
    logp_metrics,
    positive,
    reward_metrics,
    sides,
    sums,
)
from tokenward.ops.losses import one_sample_kl, token_margin
from tokenward.ops.ragged import Aligned, aligned, weighted_mean
from tokenward.tokens.batches import TokenBatch
from tokenward.tokens.needs import Needs


@dataclass
class TBPO:
    """Token-level Bregman preference optimisation (arXiv 2605.12288), also called TokenRatio.

    The mean over positions ``t`` of ``link(-log R_t)`` with ``log R_t = beta (delta_t^l - delta_t^w + b_t)``, where
    ``delta`` is the log-ratio of a token and ``t`` counts the tokens that have weight, up to the shorter response. The
    baseline ``b_t`` is the difference of the two states' KL divergences (variant A) or of a head's values (Q).

    Attributes:
        beta: Scale.
        link: See :class:`tokenward.objectives.pairs.Link`; with ``logistic`` and one token each, it is DPO.
        power: The lambda of ``ba`` and ``sba``.
        scale: The s of ``sba``.
        label_smoothing: Assumed share of flipped labels.
        baseline: ``kl``: KL(reference || policy) over the whole vocabulary, as the published code has variant A;
            ``sample``: its one-sample estimate ``r - 1 - log r`` at the token, as the paper has it, which needs no
            reference model beside the policy; ``head``: variant Q, a network on the policy's hidden state, which
            gets no gradient from it; ``none``.
        hidden: Width of that network's hidden layer; null is one linear layer.
        centre: Take the mean over the pair's positions from the head's differences.
        clamp: Limit them to this size; null does not.
        learning_rate: Of the head; null is the policy's.
        weight_decay: Of the head.
        profile: ``official`` is variant Q as the published code has it: a linear head, centred, limited to 10.
    """

    _: KW_ONLY
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
        self._head: nn.Module | None = None  # no setting, so no field
        positive("beta", self.beta, 0.1)
        self._link()
        if self.profile == "official" and (self.baseline, self.hidden, self.centre, self.clamp) != (
            "head",
            1024,
            False,
            None,
        ):
            raise UserError(
                "profile: official is variant Q with a linear head, centred and limited to 10, as the published code has it. "
                "Write baseline: head and leave hidden, centre and clamp out, or leave the profile out."
            )

    @property
    def needs(self) -> Needs:
        """Variant A compares with the reference model itself, variant Q reads the policy's hidden states."""
        kl = "forward" if self.baseline == "kl" else None
        return Needs(reference=True, kl=kl, states=self.baseline == "head", pairwise=True)

    def make_module(self, width: int, layers: int) -> ObjectiveModule | None:
        """The head of variant Q; see :class:`tokenward.objectives.base.Objective`."""
        if self.baseline != "head":
            return None
        hidden = None if self.profile == "official" else self.hidden
        if hidden is None:
            self._head = nn.Linear(width, 1)
        else:
            self._head = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        return ObjectiveModule(self._head, self.learning_rate, self.weight_decay)

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch of pairs; see :class:`tokenward.objectives.base.Objective`."""
        pairs, delta = aligned(batch.kept, batch.response, batch.responses), log_ratios(logp, batch)
        baseline = self._baseline(delta, pairs, batch)
        margin = token_margin(delta[pairs.chosen], delta[pairs.rejected], baseline, beta=self.beta)
        weights = batch.weights[pairs.chosen] * batch.weights[pairs.rejected]
        mean = (weights, pairs.pair, batch.comparisons)
        loss = weighted_mean(self._link()(margin), *mean)
        ratio = sides(self.beta * sums(delta, batch))
        metrics = {
            "margins/position": weighted_mean(margin.detach(), *mean),
            "margins/baseline": weighted_mean(baseline.detach(), *mean),
        }
        return Losses(loss, reward_metrics(ratio) | metrics | logp_metrics(logp, batch))

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
        return self._learnt(pairs, batch)

    def _learnt(self, pairs: Aligned, batch: TokenBatch) -> Tensor:
        assert self._head is not None
        centre, clamp = (True, 10.0) if self.profile == "official" else (self.centre, self.clamp)
        chosen, rejected = (
            states_through(self._head, batch.statistics["states"][index].detach()).squeeze(-1)
            for index in (pairs.chosen, pairs.rejected)
        )
        difference = rejected - chosen
        if centre:
            ones = torch.ones_like(difference)
            difference = (
                difference - weighted_mean(difference, ones, pairs.pair, batch.comparisons)[pairs.pair]
            )
        return difference if clamp is None else difference.clamp(-clamp, clamp)


def states_through(module: nn.Module, states: Tensor) -> Tensor:
    """What a module makes of hidden states, in its own precision whatever autocast says."""
    with torch.autocast(states.device.type, enabled=False):
        return module(states.to(next(module.parameters()).dtype))
