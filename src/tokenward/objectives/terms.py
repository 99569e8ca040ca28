"""Terms that stand beside another objective in a sum."""

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal

from torch import Tensor

from tokenward.errors import UserError
from tokenward.objectives.base import Losses
from tokenward.objectives.pairs import log_ratios, positive, sides, sums
from tokenward.ops.losses import pair_weight, treg
from tokenward.ops.ragged import segment_sum, weighted_sum
from tokenward.tokens.batches import TokenBatch
from tokenward.tokens.needs import Needs


@dataclass(frozen=True, slots=True)
class TReg:
    """T-REG's regulariser (arXiv 2412.02685): make tokens more or less likely by their weights, wrong pairs most.

    ``-s beta sum_t w_t log pi(y_t)`` over both responses, with ``s = sigma(r_l - r_w)`` and ``r`` beta times the
    log-ratio, summed over the tokens that have weight. The weights are signed: the paper's token rewards,
    ``sigma(.) - 1/2`` of a contrast of two prompts. T-REG itself is a sum of ``dpo`` and this with its own selection.

    Attributes:
        beta: As in the DPO term beside it.
        stop_gradient: ``weight``: ``s`` is a number; ``none``: it has its gradient. What is known of the paper
            does not say which.
    """

    needs: ClassVar[Needs] = Needs(reference=True, pairwise=True)

    _: KW_ONLY
    beta: float = 0.1
    stop_gradient: Literal["weight", "none"] = "weight"

    def __post_init__(self) -> None:
        positive("beta", self.beta, 0.1)

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch of pairs; see :class:`tokenward.objectives.base.Objective`."""
        present = (batch.weights != 0).to(batch.weights.dtype)
        ratio = weighted_sum(log_ratios(logp, batch), present, batch.response, batch.responses)
        weight = pair_weight(*sides(ratio), beta=self.beta)
        if self.stop_gradient == "weight":
            weight = weight.detach()
        loss = treg(weight, *sides(sums(logp, batch)), beta=self.beta)
        return Losses(loss, {"pair_weight": weight.detach()})


@dataclass(frozen=True, slots=True)
class TokenKL:
    """KL divergence between policy and reference over the whole vocabulary, summed over tokens.

    Attributes:
        direction: ``forward``: KL(reference || policy), as TDPO; ``reverse``: KL(policy || reference), as TIS-DPO.
        sides: ``both``: the sum over all responses, which keeps the policy near the reference. ``difference``: that
            of the rejected response less that of the chosen one, of pairs.
        stop_gradient: ``chosen``: the best response's divergence has no gradient; ``none``.
        weighted: Count each token by the size of its weight, or every token that has weight as 1.
    """

    _: KW_ONLY
    direction: Literal["forward", "reverse"] = "forward"
    sides: Literal["both", "difference"] = "both"
    stop_gradient: Literal["chosen", "none"] = "none"
    weighted: bool = True

    def __post_init__(self) -> None:
        if self.sides == "both" and self.stop_gradient == "chosen":
            raise UserError(
                "stop_gradient: chosen is for sides: difference; in the sum over both sides it would only leave the chosen "
                "one out. Write sides: difference, or leave stop_gradient out."
            )

    @property
    def needs(self) -> Needs:
        """The divergence; a sum over responses may be over one, and a difference is one of pairs."""
        difference = self.sides == "difference"
        return Needs(kl=self.direction, pairwise=difference, unpaired=None if difference else "all")

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch; see :class:`tokenward.objectives.base.Objective`."""
        weights = batch.weights.abs()
        if not self.weighted:
            weights = (weights != 0).to(weights.dtype)
        kl = weighted_sum(batch.statistics["kl"], weights, batch.response, batch.responses)
        total = segment_sum(kl, batch.comparison, batch.comparisons)
        metrics = {"kl": total.detach()}
        if self.sides == "both":
            return Losses(total, metrics)
        chosen, rejected = sides(kl)
        return Losses(rejected - (chosen.detach() if self.stop_gradient == "chosen" else chosen), metrics)
