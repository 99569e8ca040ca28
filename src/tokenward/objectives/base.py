"""What an objective receives and what it returns."""

from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from tokenward.tokens.rows import TokenBatch


class Losses(NamedTuple):
    """Unreduced result of an objective.

    Attributes:
        loss: ``[b]``, one per comparison.
        metrics: Named values ``[b]``, with TRL's names where TRL has them.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class Objective(Protocol):
    """Per-token log-probabilities, weights and reference to one loss per comparison.

    Attributes:
        needs_reference: Whether ``batch.reference_logp`` must be there.
        pairwise: Whether every comparison must have exactly two responses, the better one first.
    """

    needs_reference: ClassVar[bool]
    pairwise: ClassVar[bool]

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch.

        Args:
            logp: ``[n]`` log-probabilities under the policy; 0 at tokens without weight.
            batch: The tokens, their owners, weights and reference.
        """
        ...
