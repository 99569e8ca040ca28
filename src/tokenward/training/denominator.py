"""What the losses of an optimizer step are divided by, where the objective says it itself."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tokenward.errors import UserError
from tokenward.objectives.base import Losses, Objective, needs_of, title_of


class StepDenominator:
    """Divides a step's gradient by what its comparisons add to the denominator, once its last pass is done.

    That may depend on the policy as it is in the step, where tokens are selected by it, so it is known only when every
    pass has been made. Until then losses are divided by the number of comparisons, as those of other objectives are; a
    gradient is linear in the loss, so one factor at the end, before clipping, gives the exact one. The factor is the
    same in every process.

    Args:
        reduce: Sums of this process to those of all.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        self._reduce = reduce
        self._loss = self._total = torch.zeros(())

    def add(self, loss: Tensor, losses: Losses, counts: Tensor) -> None:
        """One pass.

        Args:
            loss: What went backward.
            losses: Of its comparisons.
            counts: ``[b]`` bool, which of them count.
        """
        assert losses.denominator is not None
        self._loss = self._loss.to(loss) + loss.detach()
        self._total = self._total.to(loss) + (losses.denominator.detach() * counts).sum()

    def close(self, model: nn.Module, comparisons: Tensor | int) -> Tensor:
        """Rescale the gradients of a whole step; returns its loss, as this process adds to it.

        Args:
            model: The trained one.
            comparisons: Of the step, over all processes, which the losses were divided by.
        """
        total = self._reduce(self._total)
        # Where nothing counts, nothing has a gradient either.
        factor = torch.where(total > 0, comparisons / total, 0.0)
        for weight in model.parameters():
            if weight.grad is not None:
                weight.grad.mul_(factor.to(weight.grad.device))
        share = self._loss * factor
        self._loss = self._total = torch.zeros(())
        return share


def check_divisible(objective: Objective, *, deepspeed: bool, optimizer: str) -> None:
    """Refuse such a denominator where the optimizer steps before the last gradient can be rescaled.

    Raises:
        UserError: the objective has one, and the optimizer steps inside the backward pass.
    """
    where = "DeepSpeed" if deepspeed else optimizer if "layerwise" in optimizer else ""
    if needs_of(objective).own_denominator and where:
        raise UserError(
            f"{title_of(objective)} divides by a sum over the whole optimizer step, which is known after its last pass, and "
            f"{where} steps inside the backward pass. Write normaliser: weights or length, or train without {where} (FSDP "
            "shards as well)."
        )
