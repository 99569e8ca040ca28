"""A class of one's own as an objective, with its first answer looked at."""

from typing import Any

from torch import Tensor

from tokenward.errors import UserError
from tokenward.objectives.base import Composite, Losses, Objective
from tokenward.tokens.rows import TokenBatch


class CheckedObjective(Composite):
    """An objective whose first result is checked before the training builds on it.

    Args:
        objective: The one to call.
        name: As the recipe has it, for messages.
    """

    def __init__(self, objective: Objective, name: str) -> None:
        super().__init__([objective])
        self._objective, self.title, self._checked = objective, name, False

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """The objective's own losses.

        Raises:
            UserError: the first result is no :class:`Losses` with one number per comparison.
        """
        losses = self._objective(logp, batch)
        if not self._checked:
            _check(self.title, losses, batch.comparisons)
            self._checked = True
        return losses


def _check(name: str, losses: Any, comparisons: int) -> None:
    if not isinstance(losses, Losses):
        raise UserError(
            f"the objective {name} returned {_shown(losses)}; it must return Losses(loss, metrics) of "
            "tokenward.objectives.base. Write return Losses(loss, {}), the loss with one number per comparison and no mean."
        )
    for label, value in {"loss": losses.loss, **losses.metrics}.items():
        if not isinstance(value, Tensor) or value.shape != (comparisons,):
            raise UserError(
                f"the objective {name} returned {_shown(value)} as {label} for a batch of {comparisons} comparisons; each is one "
                "number per comparison, not reduced. Responses lie one after another: of pairs, [0::2] are the preferred "
                "ones and [1::2] the others."
            )


def _shown(value: Any) -> str:
    shape = f" of shape {[*value.shape]}" if isinstance(value, Tensor) else ""
    return f"a {type(value).__name__}{shape}"
