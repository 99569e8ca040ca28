"""Policy gradient with a reward per token."""

from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import NamedTuple

from torch import Tensor

from tokenward.errors import UserError
from tokenward.objectives.base import Losses
from tokenward.ops.policy_gradient import (
    Baseline,
    MeanOver,
    comparison_mean,
    credit,
    reinforce,
)
from tokenward.tokens.batches import TokenBatch
from tokenward.tokens.needs import Needs


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
