"""DPO with the KL divergence of each response inside the margin: TDPO."""

from dataclasses import KW_ONLY, dataclass
from typing import Literal

from torch import Tensor

from tokenward.errors import UserError
from tokenward.objectives.base import Losses
from tokenward.objectives.pairs import (
    divergences,
    kl_metrics,
    log_ratios,
    logp_metrics,
    positive,
    reward_metrics,
    sides,
    sums,
)
from tokenward.ops.losses import tdpo
from tokenward.tokens.batches import TokenBatch
from tokenward.tokens.needs import Needs


@dataclass(frozen=True, slots=True)
class TDPO:
    """Token-level direct preference optimisation (arXiv 2404.11999): DPO, and how far each response's KL has moved.

    ``-log sigma(beta (u_w - u_l - alpha (D_l - D_w)))``, ``u`` the summed log-ratios and ``D`` the KL divergences
    KL(reference || policy) over the whole vocabulary, summed over the response's positions.

    Attributes:
        beta: Scale of the implicit reward.
        version: 1: alpha is 1 and both divergences have a gradient (TDPO1). 2, the default: that of the chosen
            response has none (TDPO2).
        alpha: Of version 2; with 0 it is DPO. A negative one turns the term round.
        direction: ``forward`` as above, or ``reverse``: KL(policy || reference).
        stop_gradient: Of version 2: ``chosen``, or ``none`` for both with their gradient. TIS-DPO's term is
            ``alpha: -0.5, direction: reverse, stop_gradient: none``.
        profile: ``official`` is version 1, which the published code trains as it stands: its configuration says
            so, against the default of its own function.
    """

    _: KW_ONLY
    beta: float = 0.1
    version: Literal[1, 2] | None = None
    alpha: float | None = None
    direction: Literal["forward", "reverse"] = "forward"
    stop_gradient: Literal["chosen", "none"] | None = None
    profile: Literal["official"] | None = None

    def __post_init__(self) -> None:
        positive("beta", self.beta, 0.1)
        if self.profile == "official" and (self.version is not None or self.direction != "forward"):
            raise UserError(
                "profile: official fixes version 1 and direction forward, as the published configuration has them. Leave the two "
                "out, or leave the profile out."
            )
        if self._version == 1 and (self.alpha is not None or self.stop_gradient is not None):
            raise UserError(
                "version 1 of TDPO has alpha 1 and stops no gradient. Leave alpha and stop_gradient out, or write version: 2."
            )

    @property
    def needs(self) -> Needs:
        """The divergence in the margin."""
        return Needs(reference=True, kl=self.direction, pairwise=True)

    @property
    def _version(self) -> int:
        return 1 if self.profile == "official" else self.version or 2

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch of pairs; see :class:`tokenward.objectives.base.Objective`."""
        ratio, kl = sides(sums(log_ratios(logp, batch), batch)), sides(divergences(batch))
        alpha, chosen = 1.0, kl.chosen
        if self._version == 2:
            alpha = 0.5 if self.alpha is None else self.alpha
            chosen = chosen if self.stop_gradient == "none" else chosen.detach()
        loss = tdpo(*ratio, chosen, kl.rejected, beta=self.beta, alpha=alpha)
        rewards = reward_metrics(
            ratio._replace(chosen=self.beta * ratio.chosen, rejected=self.beta * ratio.rejected)
        )
        return Losses(loss, rewards | kl_metrics(batch) | logp_metrics(logp, batch))
