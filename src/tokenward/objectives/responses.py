"""Objectives of single responses: likelihood, KTO and the policy gradient."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.objectives.base import Losses
from tokenward.objectives.pairwise import divergences, log_ratios, sums
from tokenward.ops.losses import kto, likelihood
from tokenward.ops.policy_gradient import (
    Baseline,
    MeanOver,
    Spread,
    comparison_mean,
    credit,
    reinforce,
)
from tokenward.ops.ragged import segment_sum, weighted_mean, weighted_sum
from tokenward.plugins import check_positive, validated
from tokenward.tokens.batches import Needs, TokenBatch
from tokenward.trl_names import answers_trl


@answers_trl
@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class WeightedLikelihood:
    """Reward-weighted maximum likelihood of the best response (TLM, arXiv 2306.00398, with supervised data).

    ``-sum_t w_t log pi(y_t | s_t)`` with ``w_t = r_t / sum_t' r_t'``. With weights of 1 it is supervised fine-tuning: the
    mean negative log-probability. Tied best responses count as one sequence. A token with a negative weight is made less
    likely. A comparison without any weight has loss 0.

    Attributes:
        normaliser: ``weights``: divide by the sum of absolute weights, as in the paper, so that every sequence counts the
            same. ``length``: divide by the number of tokens, so that a sequence with larger weights counts more. ``none``:
            the sum. ``step_weights`` and ``step_length``: divide by the sum of absolute weights, or the number of tokens, of
            the whole optimizer step, as Rho-1 (arXiv 2404.07965) and TOSS (arXiv 2603.01185) do.
        sides: ``best`` responses, or ``both``: every response of the comparison.
    """

    normaliser: Literal["weights", "length", "none", "step_weights", "step_length"] = "weights"
    sides: Literal["best", "both"] = "best"

    @property
    def needs(self) -> Needs:
        whole_step = self.normaliser.startswith("step_")
        return Needs(own_denominator=whole_step, unpaired="all" if self.sides == "both" else "good")

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
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
"""Supervised fine-tuning: the default settings and weights of 1."""


@answers_trl
@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class KTO:
    """Kahneman-Tversky optimisation (arXiv 2402.01306): every response is desirable (rank 0) or undesirable.

    The mean over the comparison's responses, of which there may be only one, of ``w (1 - sigma(beta (u - z)))``, with the
    opposite sign inside sigma for undesirable ones. ``u`` is the summed log-ratio and ``z`` a reference point without
    gradient.

    Attributes:
        beta: Scale of the implicit reward.
        desirable: Weight of desirable responses; the paper's lambda_D.
        undesirable: Weight of undesirable responses; lambda_U.
        anchor: Reference point. ``kl``: the mean KL(policy || reference) of the comparison's responses, over the whole
            vocabulary. ``zero``: 0, which needs no reference model during training. The paper uses mismatched prompts and
            responses of the batch, so that its loss depends on how a batch is cut.
    """

    beta: float = 0.1
    desirable: float = 1.0
    undesirable: float = 1.0
    anchor: Literal["kl", "zero"] = "kl"

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)
        if not (self.desirable >= 0 and self.undesirable >= 0 and self.desirable + self.undesirable > 0):
            raise UserError(
                f"desirable and undesirable must be 0 or more and not both 0, got {self.desirable} and {self.undesirable}.",
                code="out-of-range",
            )

    @property
    def needs(self) -> Needs:
        return Needs(reference=True, kl="reverse" if self.anchor == "kl" else None, unpaired="all")

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        ratio, good = sums(log_ratios(logp, batch), batch), batch.rank == 0
        anchor = self._anchor(ratio, batch)
        losses = kto(
            ratio,
            good,
            anchor[batch.comparison],
            beta=self.beta,
            desirable_weight=self.desirable,
            undesirable_weight=self.undesirable,
        )
        reward = self.beta * ratio.detach()
        metrics, having = {}, {}
        for name, some in (("rewards/chosen", good), ("rewards/rejected", ~good)):
            metrics[name] = self._mean(reward, some, batch)
            count = segment_sum(some.to(reward.dtype), batch.comparison, batch.comparisons)
            having[name] = count.clamp(max=1)
        metrics["kl"] = anchor
        return Losses(self._mean(losses, torch.ones_like(good), batch), metrics, having=having)

    def _anchor(self, ratio: Tensor, batch: TokenBatch) -> Tensor:
        """The reference point of each comparison.  -> [b]"""
        if self.anchor == "zero":
            return ratio.new_zeros(batch.comparisons)
        kl = divergences(batch).detach().to(ratio.dtype)
        return self._mean(kl, torch.ones_like(batch.rank, dtype=torch.bool), batch).clamp(min=0)

    def _mean(self, values: Tensor, among: Tensor, batch: TokenBatch) -> Tensor:
        """Mean over some of a comparison's responses, 0 if there are none.  [r] -> [b]"""
        flags = among.to(values.dtype)
        some = segment_sum(flags, batch.comparison, batch.comparisons) != 0
        return torch.where(some, weighted_mean(values, flags, batch.comparison, batch.comparisons), 0.0)


@answers_trl
@dataclass(frozen=True, slots=True, kw_only=True)
@validated
class Reinforce:
    """REINFORCE with token rewards and maximum entropy (TLM, arXiv 2306.00398, without supervised data).

    ``-mean_t [ r_t log pi(a_t | s_t) + alpha H(pi(. | s_t)) ]`` over responses sampled from the policy; the rewards
    ``batch.scores`` carry no gradient. With the immediate reward, TLM's choice, the optimum at every state is
    ``pi(a | s)`` proportional to ``exp(r(s, a) / alpha)``; with ``return_to_go``, ``normaliser="sum"`` and no entropy, the expected
    gradient is that of the expected return.

    Attributes:
        entropy: The paper's alpha, 0.125 in the published code.
        return_to_go: Weigh each token with the sum of rewards from itself to the end instead of its own.
        discount: Discount of later rewards, in [0, 1]; only with ``return_to_go``.
        spread: ``sequence`` weighs every token with the sum of its response's rewards: REINFORCE with one reward per response,
            the control that shows whether rewards of tokens matter. ``token``: as above.
        baseline: What is subtracted: ``none``, the ``mean`` of the comparison's responses, or ``leave_one_out``, the mean
            of its other responses, which does not change the expected gradient of a ``sum``.
        kl: Coefficient of a KL penalty: each reward is reduced by ``kl (log pi - log pi_ref)`` of its token.
        normaliser: ``token``: mean over all tokens of the comparison; ``sequence``: over the means of its responses. Both divide by
            sampled lengths, which favours short replies. ``sum``: over the sums of its responses, which favours no length.
    """

    entropy: float = 0.125
    return_to_go: bool = False
    discount: float = 1.0
    spread: Spread = "token"
    baseline: Baseline = "none"
    kl: float = 0.0
    normaliser: MeanOver = "token"

    def __post_init__(self) -> None:
        if not (self.entropy >= 0 and self.kl >= 0):
            raise UserError(
                f"entropy and kl must be 0 or more, got {self.entropy} and {self.kl}.", code="out-of-range"
            )
        if not 0 <= self.discount <= 1:
            raise UserError(
                f"discount must be in [0, 1], got {self.discount}. Write 1.0 for no discount.",
                code="out-of-range",
            )
        if self.discount != 1 and not self.return_to_go:
            raise UserError(
                "discount has no effect without return_to_go. Write return_to_go: true, or leave it out.",
                code="conflicting-settings",
            )
        if self.spread == "sequence" and self.return_to_go:
            raise UserError(
                "spread: sequence gives every token the sum of all rewards of its response, and return_to_go the sum of its own and the "
                "later ones. Remove one of them.",
                code="conflicting-settings",
            )

    @property
    def needs(self) -> Needs:
        return Needs(scores=True, reference=self.kl != 0, entropy=self.entropy != 0)

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        if batch.scores is None:
            raise UserError(
                "Reinforce needs the rewards of sampled tokens (batch.scores), and this batch has none. It is for online runs; "
                "for responses of a data set use the objective weighted_likelihood.",
                code="missing-scores",
            )
        # Tokens without weight are dropped before anything is multiplied: 0 * NaN is NaN.
        keep = batch.kept
        kept_logp, rewards, response = logp[keep], batch.scores[keep], batch.response[keep]
        average = partial(
            comparison_mean,
            weights=batch.weights[keep],
            response=response,
            comparison=batch.comparison,
            comparisons=batch.comparisons,
        )
        mean = partial(average, over="token" if self.normaliser == "sum" else self.normaliser)
        metrics, entropy = {"reward/token": mean(rewards)}, None
        if self.kl:
            assert batch.reference_logp is not None
            ratio = kept_logp.detach() - batch.reference_logp[keep]
            metrics["kl"] = mean(ratio)
            rewards = rewards - self.kl * ratio
        if self.entropy:
            entropy = batch.statistics["entropy"][keep]
            metrics["entropy"] = mean(entropy)
        weights = credit(
            rewards,
            response,
            batch.comparison,
            batch.comparisons,
            discount=self.discount if self.return_to_go else None,
            baseline=self.baseline,
            spread=self.spread,
        )
        total = partial(average, over=self.normaliser)
        loss = reinforce(kept_logp, weights, entropy, total, alpha=self.entropy)
        return Losses(loss, {name: value.detach() for name, value in metrics.items()})
