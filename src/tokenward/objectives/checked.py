"""A class of one's own as an objective, with its first answer looked at."""

from typing import Any

from torch import Tensor

from tokenward.errors import UserError
from tokenward.objectives.base import Composite, Losses, Objective
from tokenward.tokens.batches import TokenBatch


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
            UserError: the first result is no :class:`Losses` with one number per comparison, or has a
                denominator that the objective does not announce, or none where it announces one.
        """
        losses = self._objective(logp, batch)
        if not self._checked:
            _check(self.title, losses, batch.comparisons)
            _check_denominator(self.title, losses, batch.comparisons, announced=self.own_denominator)
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


def _check_denominator(name: str, losses: Losses, comparisons: int, *, announced: bool) -> None:
    found = losses.denominator
    if announced != (found is not None):
        did = (
            "says own_denominator and returned none"
            if announced
            else "returned a denominator and does not say so"
        )
        raise UserError(
            f"the objective {name} {did}: what divides a step must be known before it begins. Write own_denominator = True in the "
            "class and return Losses(loss, metrics, denominator), or leave both out for the mean over comparisons."
        )
    if found is None:
        return
    if not isinstance(found, Tensor) or found.shape != (comparisons,) or not bool((found >= 0).all()):
        raise UserError(
            f"the objective {name} returned {_shown(found)} as denominator for a batch of {comparisons} comparisons; it is one "
            "number of 0 or more per comparison, such as how many tokens it has."
        )


def _shown(value: Any) -> str:
    shape = f" of shape {[*value.shape]}" if isinstance(value, Tensor) else ""
    return f"a {type(value).__name__}{shape}"
