"""What an objective receives and what it returns."""

from typing import NamedTuple, Protocol

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

    One may have three flags, as class attributes or properties; a flag that is not there is False:
    ``needs_reference`` (``batch.reference_logp`` must be there), ``needs_entropy`` (``batch.entropy`` must), and
    ``pairwise`` (every comparison must have exactly two responses, the better one first).
    """

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch.

        Args:
            logp: ``[n]`` log-probabilities under the policy, 0 at tokens without weight; rewards where a
                token reward model is trained.
            batch: The tokens, their owners, weights and reference.
        """
        ...


def needs_reference(objective: Objective) -> bool:
    """Whether an objective reads ``batch.reference_logp``."""
    return bool(getattr(objective, "needs_reference", False))


def needs_entropy(objective: Objective) -> bool:
    """Whether an objective reads ``batch.entropy``."""
    return bool(getattr(objective, "needs_entropy", False))


def is_pairwise(objective: Objective) -> bool:
    """Whether an objective is over pairs, the better response first."""
    return bool(getattr(objective, "pairwise", False))
