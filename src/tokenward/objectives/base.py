"""What an objective receives, declares and returns."""

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from operator import or_
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from tokenward.errors import UserError
from tokenward.tokens.batches import NOTHING, Needs, TokenBatch

DRAW = "draw"
"""Key in ``batch.values`` of a random number that is new in each optimizer step; see :attr:`Needs.draws`."""


class Losses(NamedTuple):
    """The unreduced result of an objective for ``b`` comparisons.

    Attributes:
        loss: ``[b]``, one loss per comparison.
        metrics: Named values, ``[b]`` each and without gradient; TRL's names where TRL has them.
        denominator: ``[b]``, 0 or more, or None. The loss of an optimizer step is ``sum loss / sum denominator`` over all
            its comparisons, however they are cut into passes; without a denominator it is their mean. An objective that
            returns one must declare ``Needs(own_denominator=True)``.
        having: ``[b]`` by metric, 1 if the comparison has the metric and 0 if not, such as the reward of the chosen response
            of a comparison that has only a rejected one. Metrics that are not named exist for every comparison.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    denominator: Tensor | None = None
    having: Mapping[str, Tensor] | None = None

    @property
    def whole(self) -> Tensor:
        """The loss of an optimizer step that has only these comparisons.  -> []"""
        return self.loss.mean() if self.denominator is None else self.loss.sum() / self.denominator.sum()


class ObjectiveModule(NamedTuple):
    """A module of an objective that is trained with the policy.

    Attributes:
        module: The module, which the objective keeps as well.
        learning_rate: Its learning rate; None is the policy's.
        weight_decay: Its weight decay.
    """

    module: nn.Module
    learning_rate: float | None
    weight_decay: float


class Objective(Protocol):
    """Computes one loss per comparison from the log-probabilities and weights of its tokens.

    An objective that needs more declares it as ``needs``, a class attribute or property such as
    ``Needs(reference=True, pairwise=True)``; see :class:`tokenward.tokens.batches.Needs`.

    An objective with a module to train has a method ``make_module(width, layers) -> ObjectiveModule | None``. It is called
    once before training with the policy's hidden size and number of layers; it makes the module, keeps and returns it.
    """

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch.

        Args:
            logp: ``[n]`` log-probabilities in nats under the policy, with gradient; 0 at tokens of weight 0. While a token
                reward model is trained, its rewards instead.
            batch: The tokens with their owners, weights ``[n]`` and whatever ``needs`` declares. The responses of a comparison
                follow each other; if every comparison is a pair, ``[0::2]`` of values per response is the preferred side.

        Returns:
            The losses, not reduced. A token of weight 0 must have no effect on them.
        """
        ...


def title_of(objective: Objective) -> str:
    """Name of an objective for messages: a custom one's name in the recipe, else the class."""
    return getattr(objective, "title", "") or type(objective).__name__


def needs_of(objective: Objective) -> Needs:
    """What an objective declares as ``needs``; by default only log-probabilities and weights.

    Raises:
        UserError: ``needs`` is not a :class:`Needs`.
    """
    needs = getattr(objective, "needs", NOTHING)
    if not isinstance(needs, Needs):
        raise UserError(
            f"{title_of(objective)} has needs = {needs!r}. Write for example needs = Needs(reference=True), with Needs from "
            "tokenward.objectives.",
            code="invalid-needs",
        )
    return needs


class Composite:
    """Base of the objectives that call other objectives: it needs what any of them needs.

    Args:
        parts: The objectives that it calls.

    Raises:
        UserError: Two of them need KL divergences in different directions.
    """

    def __init__(self, parts: Sequence[Objective]) -> None:
        self.parts = tuple(parts)
        self.needs = reduce(or_, map(needs_of, self.parts)) if self.parts else NOTHING


def parts_within(objective: Objective) -> Iterator[Objective]:
    """An objective and all those that it calls, at any depth."""
    yield objective
    for part in getattr(objective, "parts", ()):
        yield from parts_within(part)


def has_module(objective: Objective) -> bool:
    """Whether an objective, or one that it calls, may have a module to train."""
    return any(hasattr(part, "make_module") for part in parts_within(objective))


def modules_of(objective: Objective, width: int, layers: int) -> list[ObjectiveModule]:
    """Make the modules of an objective and of those that it calls, for a policy of this hidden size and depth."""
    modules = [
        part.make_module(width, layers)  # type: ignore[attr-defined]
        for part in parts_within(objective)
        if hasattr(part, "make_module")
    ]
    return [module for module in modules if module is not None]
