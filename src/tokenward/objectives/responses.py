"""Objectives of single responses: likelihood, KTO and the policy gradient."""

from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.objectives.base import Losses
from tokenward.objectives.pairwise import divergences, log_ratios, positive, sums
from tokenward.ops.losses import kto, likelihood
from tokenward.ops.policy_gradient import (
    Baseline,
    MeanOver,
    comparison_mean,
    credit,
    reinforce,
)
from tokenward.ops.ragged import segment_sum, weighted_mean, weighted_sum
from tokenward.tokens.batches import Needs, TokenBatch


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


class _KeptTokens(NamedTuple):
    """What is known of the tokens that have weight.  [m] each"""

    logp: Tensor
    rewards: Tensor
    weights: Tensor
    response: Tensor


@dataclass(frozen=True, slots=True)
class Reinforce:
    """REINFORCE with a reward per token and maximum entropy (TLM, arXiv 2306.00398, without supervised data).

    ``-mean_t [ r_t log pi(a_t | s_t) + alpha H(pi(. | s_t)) ]`` over responses that were sampled from the policy; the
    rewards, ``batch.scores``, carry no gradient. With the immediate reward, TLM's choice, the optimum at every state
    is ``pi(a | s)`` proportional to ``exp(r(s, a) / alpha)``; with ``return_to_go`` the gradient is that of the
    expected return.

    Attributes:
        entropy: The paper's alpha, 0.125 in the published code.
        return_to_go: Weight a token with the rewards from itself to the end in the place of its own.
        discount: Of the rewards to come, in [0, 1]; only with ``return_to_go``.
        baseline: What is subtracted: ``none``, the ``mean`` of the comparison's responses, or ``leave_one_out``, the
            mean of its other responses, which leaves the expected gradient as it is.
        kl: Each reward is lowered by ``kl (log pi - log pi_ref)`` of its token.
        normaliser: ``token``: mean over all tokens of the comparison; ``sequence``: over the means of its responses.
    """

    _: KW_ONLY
    entropy: float = 0.125
    return_to_go: bool = False
    discount: float = 1.0
    baseline: Baseline = "none"
    kl: float = 0.0
    normaliser: MeanOver = "token"

    def __post_init__(self) -> None:
        for name in ("entropy", "kl"):
            if not getattr(self, name) >= 0:
                raise UserError(
                    f"{name} must be 0 or more, got {getattr(self, name)}. Write 0 to leave it out."
                )
        if not 0 <= self.discount <= 1:
            raise UserError(
                f"discount must be in [0, 1], got {self.discount}. Write 1.0 to discount nothing."
            )
        if self.discount != 1 and not self.return_to_go:
            raise UserError(
                "discount has no meaning without return_to_go. Write return_to_go: true, or leave it out."
            )

    @property
    def needs(self) -> Needs:
        """Only the KL penalty compares with the reference."""
        return Needs(scores=True, reference=self.kl != 0, entropy=self.entropy != 0)

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch of sampled responses; see :class:`tokenward.objectives.base.Objective`."""
        if batch.scores is None:
            raise UserError(
                "Reinforce trains on the rewards of sampled tokens, and these rows have none. Train with it in the loop that "
                "samples and scores; for written responses use objective: {name: weighted_likelihood}."
            )
        # A token without weight is left out before anything is multiplied: 0 times NaN would be NaN.
        keep = batch.kept
        kept = _KeptTokens(logp[keep], batch.scores[keep], batch.weights[keep], batch.response[keep])
        metrics = {"reward/token": self._mean(kept.rewards, kept, batch)}
        if self.kl:
            assert batch.reference_logp is not None
            ratio = kept.logp.detach() - batch.reference_logp[keep]
            metrics["kl"] = self._mean(ratio, kept, batch)
            kept = kept._replace(rewards=kept.rewards - self.kl * ratio)
        entropy = None
        if self.entropy:
            entropy = batch.statistics["entropy"][keep]
            metrics["entropy"] = self._mean(entropy, kept, batch)
        mean = partial(self._mean, kept=kept, batch=batch)
        loss = reinforce(kept.logp, self._credit(kept, batch), entropy, mean, alpha=self.entropy)
        return Losses(loss, {name: value.detach() for name, value in metrics.items()})

    def _credit(self, kept: _KeptTokens, batch: TokenBatch) -> Tensor:
        """What each log-probability is weighted with, without gradient.  -> [m]"""
        return credit(
            kept.rewards,
            kept.response,
            batch.comparison,
            batch.comparisons,
            discount=self.discount if self.return_to_go else None,
            baseline=self.baseline,
        )

    def _mean(self, values: Tensor, kept: _KeptTokens, batch: TokenBatch) -> Tensor:
        """Mean over a comparison's tokens, or over its responses' means.  [m] -> [b]"""
        owners = (kept.response, batch.comparison, batch.comparisons)
        return comparison_mean(values, kept.weights, *owners, self.normaliser)
