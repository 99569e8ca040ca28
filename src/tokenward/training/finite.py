"""A loss that is not finite stops the training, without the host waiting for the device at every step."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from tokenward.errors import UserError


class _Unseen(NamedTuple):
    """Losses of a pass that have not been looked at yet."""

    losses: Tensor
    sources: Sequence[str]
    step: int


class FiniteLosses:
    """Remembers losses until somebody has a reason to look at them.

    To look at a number makes the host wait for the device. On the CPU nothing is waited for, so there a loss
    is looked at once; an accelerator is asked when a step logs, and before anything is saved.
    """

    def __init__(self) -> None:
        self._unseen: list[_Unseen] = []

    def note(self, losses: Tensor, sources: Sequence[str], step: int) -> None:
        """The losses of a pass.  [b]

        Args:
            losses: One per comparison.
            sources: Where the comparisons came from.
            step: Of the optimizer.

        Raises:
            UserError: see :meth:`check`.
        """
        self._unseen.append(_Unseen(losses.detach(), sources, step))
        if losses.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Look at what was noted.

        Raises:
            UserError: a loss is not finite; names the step and the comparisons.
        """
        unseen, self._unseen = self._unseen, []
        for losses, sources, step in unseen:
            if not bool(losses.isfinite().all()):
                raise UserError(_not_finite(losses.tolist(), sources, step))


def _not_finite(losses: Sequence[float], sources: Sequence[str], step: int) -> str:
    rows = ", ".join(source for source, loss in zip(sources, losses, strict=True) if loss - loss != 0)
    return (
        f"the loss is not finite at step {step}, for: {rows}. What was saved before is untouched. Lower "
        "training.learning_rate, set training.max_grad_norm, or look at these rows with tokenward data RECIPE."
    )
