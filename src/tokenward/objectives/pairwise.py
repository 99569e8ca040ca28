"""Objectives over pairs: one family, of which DPO, IPO, SimPO and SePO are settings, and ORPO."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.objectives.base import Losses
from tokenward.ops import links
from tokenward.ops.losses import ipo, margin_logistic, orpo, pairwise
from tokenward.ops.ragged import segment_sum, weighted_sum
from tokenward.plugins import check_positive, validated
from tokenward.tokens.batches import Needs, TokenBatch
from tokenward.trl_names import answers_trl


class PairSides(NamedTuple):
    """One quantity for the chosen and the rejected response of each pair.  [b] each"""

    chosen: Tensor
    rejected: Tensor


def sides(per_response: Tensor) -> PairSides:
    """Split values of responses in the order chosen, rejected, chosen, rejected.  [2 b] -> [b], [b]"""
    return PairSides(per_response[0::2], per_response[1::2])


def log_ratios(logp: Tensor, batch: TokenBatch) -> Tensor:
    """``log pi - log pi_ref`` of each token.  -> [n]"""
    assert batch.reference_logp is not None
    return logp - batch.reference_logp


def sums(values: Tensor, batch: TokenBatch) -> Tensor:
    """Weighted sum over the tokens of each response.  [n] -> [r]"""
    return weighted_sum(values, batch.weights, batch.response, batch.responses)


def absolute_weights(batch: TokenBatch) -> Tensor:
    """Sum of the absolute weights of each response.  -> [r]"""
    # The denominator of a mean: a plain sum of negative weights would flip the sign of each of them.
    return segment_sum(batch.weights.abs(), batch.response, batch.responses)


def lengths_of(batch: TokenBatch) -> Tensor:
    """Number of tokens of each response, with and without weight.  -> [r]"""
    return segment_sum(torch.ones_like(batch.weights), batch.response, batch.responses)


def divergences(batch: TokenBatch) -> Tensor:
    """KL divergence of each response, summed over its tokens with their absolute weights.  -> [r]"""
    return weighted_sum(batch.statistics["kl"], batch.weights.abs(), batch.response, batch.responses)


LinkName = Literal["logistic", "hinge", "robust", "kliep", "lsif", "ba", "sba"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A loss of the margin ``z`` by which the chosen side leads; see :mod:`tokenward.ops.links`.

    Attributes:
        name: ``logistic`` (DPO), ``hinge``, ``robust`` (unbiased under flipped labels), or ``kliep``, ``lsif``, ``ba`` or
            ``sba`` of the Bregman family.
        label_smoothing: Assumed share ``e`` of flipped labels. For all but ``robust``: ``(1 - e) L(z) + e L(-z)``.
        power: Lambda of ``ba`` and ``sba``.
        scale: Scale s of ``sba``.
    """

    name: LinkName = "logistic"
    label_smoothing: float = 0.0
    power: float = 0.0
    scale: float = 4.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(
                f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}: at 0.5 the labels carry no information.",
                code="out-of-range",
            )
        if not (self.power >= 0 and self.scale > 0):
            raise UserError(
                f"a Bregman link needs power >= 0 and scale > 0, got {self.power} and {self.scale}. Write for example "
                "power: 0.0, scale: 4.0.",
                code="out-of-range",
            )

    def __call__(self, margin: Tensor) -> Tensor:
        """The loss of each margin.  [...] -> [...]"""
        if self.name == "robust":
            return links.robust(margin, self.label_smoothing)
        plain: dict[str, links.Link] = {
            "logistic": links.logistic,
            "hinge": links.hinge,
            "kliep": links.kliep,
            "lsif": links.lsif,
            "ba": lambda z: links.basu(z, self.power),
            "sba": lambda z: links.scaled_basu(z, self.power, self.scale),
        }
        return links.smoothed(plain[self.name], margin, self.label_smoothing)


def reward_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """TRL's metrics of the rewards of pairs, without gradient.  [b], [b] -> [b] each"""
    chosen, rejected = chosen.detach(), rejected.detach()
    margins = chosen - rejected
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).float(),
    }


def logp_metrics(logp: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
    """Metrics of the log-probabilities of the tokens with weight, and the share of tokens with weight.

    ``logps/chosen_change_per_token`` is there if the batch has reference values.
    """
    logp = logp.detach()
    total = sides(sums(logp, batch))
    weight = sides(segment_sum(batch.weights, batch.response, batch.responses))
    kept = sides(segment_sum((batch.weights != 0).float(), batch.response, batch.responses))
    lengths = sides(lengths_of(batch))
    metrics = {
        "logps/chosen": total.chosen,
        "logps/rejected": total.rejected,
        "logps/chosen_per_token": _per_weight(total.chosen, weight.chosen),
        "kept/chosen": kept.chosen / lengths.chosen,
        "kept/rejected": kept.rejected / lengths.rejected,
    }
    if batch.reference_logp is not None:
        change = sums(logp - batch.reference_logp, batch)
        metrics["logps/chosen_change_per_token"] = _per_weight(sides(change).chosen, weight.chosen)
    return metrics


def kl_metrics(batch: TokenBatch) -> dict[str, Tensor]:
    """KL divergence to the reference of both sides, summed over the tokens with weight."""
    kl = sides(divergences(batch).detach())
    return {"kl/chosen": kl.chosen, "kl/rejected": kl.rejected}


def _per_weight(total: Tensor, weight: Tensor) -> Tensor:
    # A pair without weight gives 0, so that it does not turn the mean over all pairs into NaN.
    return torch.where(weight != 0, total / weight, 0.0)


def _family(
    logp: Tensor,
    batch: TokenBatch,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    beta: float,
    reference: bool,
    size: Tensor | None,
) -> Losses:
    """A loss of the weighted log-ratios or log-probabilities of pairs, divided by a size of each response.

    The reward is beta times the value that the loss compares; with a reference it is DPO's implicit reward of the whole
    response, which is not divided.
    """
    total = sums(log_ratios(logp, batch) if reference else logp, batch)
    compared = total if size is None else total / size
    metrics = reward_metrics(*sides(beta * (total if reference else compared))) | logp_metrics(logp, batch)
    return Losses(loss(*sides(compared)), metrics)


@answers_trl
@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class Pairwise:
    """``link(beta (u_w - u_l) - margin)``, with ``u`` the weighted log-ratios or log-probabilities of a response.

    A token with a negative weight counts for the other side.

    Attributes:
        link: ``logistic``, ``hinge``, ``robust``, ``kliep``, ``lsif``, ``ba`` or ``sba``; see :class:`Link`. ``ipo`` is
            ``(u_w - u_l - 1 / (2 beta))^2``; ``odds`` is the logistic of the log-odds ratio of the mean probabilities (ORPO).
        beta: Scale of the difference.
        margin: Target for the scaled difference; not for ``ipo``.
        label_smoothing: Assumed share of flipped labels.
        reference: Whether ``u`` is made of log-ratios to the reference.
        aggregate: ``sum`` over tokens; ``mean``: divided by the sum of absolute weights; ``length``: divided by the number
            of tokens.
        power: Lambda of ``ba`` and ``sba``.
        scale: Scale s of ``sba``.
    """

    link: Literal["logistic", "hinge", "robust", "ipo", "odds", "kliep", "lsif", "ba", "sba"] = "logistic"
    beta: float = 0.1
    margin: float = 0.0
    label_smoothing: float = 0.0
    reference: bool = True
    aggregate: Literal["sum", "mean", "length"] = "sum"
    power: float = 0.0
    scale: float = 4.0

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)
        self._link()
        if self.link == "ipo" and (self.label_smoothing or self.margin):
            raise UserError(
                "label_smoothing and margin have no effect with ipo, whose target is 1 / (2 beta). Leave them out.",
                code="conflicting-settings",
            )
        if self.link == "odds" and (self.reference or self.aggregate == "sum"):
            raise UserError(
                "link: odds compares mean probabilities and uses no reference. Write reference: false, aggregate: mean.",
                code="conflicting-settings",
            )

    @property
    def needs(self) -> Needs:
        return Needs(reference=self.reference, pairwise=True)

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        size = None
        if self.aggregate != "sum":
            size = absolute_weights(batch) if self.aggregate == "mean" else lengths_of(batch)
        return _family(logp, batch, self._loss, beta=self.beta, reference=self.reference, size=size)

    def _loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        if self.link == "ipo":
            return ipo(chosen, rejected, beta=self.beta)
        if self.link == "odds":
            chosen, rejected = links.log_odds(chosen), links.log_odds(rejected)
        return pairwise(chosen, rejected, link=self._link(), beta=self.beta, margin=self.margin)

    def _link(self) -> Link:
        name = "logistic" if self.link in ("ipo", "odds") else self.link
        return Link(name=name, label_smoothing=self.label_smoothing, power=self.power, scale=self.scale)


@answers_trl
@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class DPO:
    """Direct preference optimisation over the weighted tokens (arXiv 2305.18290, Eq. 7).

    Attributes:
        beta: Scale of the implicit reward.
        label_smoothing: Assumed share of flipped labels (cDPO); for the sigmoid loss only.
        loss: ``sigmoid``, or ``ipo`` (arXiv 2310.12036) with mean log-ratios, as in TRL.
    """

    needs: ClassVar[Needs] = Needs(reference=True, pairwise=True)

    beta: float = 0.1
    label_smoothing: float = 0.0
    loss: Literal["sigmoid", "ipo"] = "sigmoid"

    def __post_init__(self) -> None:
        self._pairwise()

    def _pairwise(self) -> Pairwise:
        link, aggregate = ("ipo", "mean") if self.loss == "ipo" else ("logistic", "sum")
        return Pairwise(link=link, beta=self.beta, label_smoothing=self.label_smoothing, aggregate=aggregate)

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        return self._pairwise()(logp, batch)


@answers_trl
@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class IPO:
    """Identity preference optimisation with mean log-ratios (arXiv 2310.12036, Eq. 17; ``beta`` is its tau)."""

    needs: ClassVar[Needs] = Needs(reference=True, pairwise=True)

    beta: float = 0.1

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        return DPO(beta=self.beta, loss="ipo")(logp, batch)


@answers_trl
@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class SePO:
    """Selective preference optimisation (arXiv 2408.13518, objective of section 3).

    ``-log sigma(u_w - u_l - margin)`` with ``u = gamma / z * sum_t w_t log pi(y_t)``, where ``w`` is 1 for the selected
    tokens and ``z`` the normaliser. With every token selected it is SimPO.

    Attributes:
        gamma: Scale; the paper searches 2.1 to 2.5, the published code uses 1.
        margin: The paper's lambda; 0 in the published code.
        normaliser: ``selected``: the sum of absolute weights. ``rate``: the length times the side's rate, as in the paper's
            formula. ``length``: the number of tokens. ``none``: 1.
        chosen_rate: Rate of the chosen side for ``normaliser: rate``.
        rejected_rate: Rate of the rejected side for ``normaliser: rate``.
        profile: ``official`` uses the published code's values: gamma 1, margin 0, normaliser selected.
    """

    needs: ClassVar[Needs] = Needs(pairwise=True)

    gamma: float = 2.0
    margin: float = 0.0
    normaliser: Literal["selected", "rate", "length", "none"] = "selected"
    chosen_rate: float | None = None
    rejected_rate: float | None = None
    profile: Literal["official"] | None = None

    def __post_init__(self) -> None:
        check_positive(gamma=self.gamma)
        rates = (self.chosen_rate, self.rejected_rate)
        if self.normaliser == "rate" and not all(rate is not None and 0 < rate <= 1 for rate in rates):
            raise UserError(
                f"normaliser: rate needs chosen_rate and rejected_rate in (0, 1], got {rates[0]} and {rates[1]}. Write "
                "the two fractions of the selection, or normaliser: selected.",
                code="missing-setting",
            )
        if self.profile and (self.gamma, self.margin, self.normaliser) != (2.0, 0.0, "selected"):
            raise UserError(
                "profile: official fixes gamma 1, margin 0 and normaliser selected, as in the published code. "
                "Leave gamma, margin and normaliser out, or leave the profile out.",
                code="conflicting-settings",
            )

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        beta = 1.0 if self.profile else self.gamma
        loss = partial(margin_logistic, scale=beta, margin=self.margin)
        return _family(logp, batch, loss, beta=beta, reference=False, size=self._size(batch))

    def _size(self, batch: TokenBatch) -> Tensor | None:
        if self.normaliser == "none":
            return None
        if self.normaliser == "selected":
            return absolute_weights(batch)
        lengths = lengths_of(batch)
        if self.normaliser == "length":
            return lengths
        rates = lengths.new_tensor([self.chosen_rate, self.rejected_rate])
        return lengths * rates.repeat(batch.comparisons)


@answers_trl
@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class SimPO:
    """Simple preference optimisation (arXiv 2405.14734, Eq. 6) over the weighted tokens.

    Attributes:
        beta: Scale of the mean log-probability.
        gamma: Target margin. TRL calls it ``simpo_gamma``; the SimPO code takes the ratio ``gamma / beta``.
    """

    needs: ClassVar[Needs] = Needs(pairwise=True)

    beta: float = 2.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        return SePO(gamma=self.beta, margin=self.gamma)(logp, batch)


@answers_trl
@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class ORPO:
    """Odds ratio preference optimisation (arXiv 2403.07691, Eq. 6): likelihood of the chosen response plus an odds ratio.

    ``-p_w - beta log sigma(log odds(p_w) - log odds(p_l))`` with ``p`` the mean log-probability of the weighted tokens and
    ``log odds(p) = p - log(1 - exp(p))``, which is exact near ``p = 0`` and cut off at -1e-6.

    Attributes:
        beta: Factor of the odds ratio; the paper's lambda.
    """

    needs: ClassVar[Needs] = Needs(pairwise=True)

    beta: float = 0.1

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        odds = Pairwise(link="odds", beta=1.0, reference=False, aggregate="mean")(logp, batch)
        chosen, rejected = sides(sums(logp, batch) / absolute_weights(batch))
        rewards = reward_metrics(self.beta * chosen, self.beta * rejected)
        metrics = {"nll": -chosen.detach(), "loss/odds": odds.loss.detach()}
        return Losses(orpo(odds.loss, chosen, beta=self.beta), odds.metrics | rewards | metrics)
