"""What an objective receives, what it needs of that, and what it returns."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import reduce
from operator import or_
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from tokenward.errors import UserError
from tokenward.tokens.batches import NOTHING, Needs, TokenBatch

DRAW = "draw"
"""In ``batch.values`` while an objective that needs it trains: one number, another one in each optimizer step; see :attr:`Needs.draws`."""


class Losses(NamedTuple):
    """Unreduced result of an objective.

    Attributes:
        loss: ``[b]``, one per comparison.
        metrics: Named values ``[b]``, with TRL's names where TRL has them.
        denominator: ``[b]``, 0 or more, or None: what each comparison adds to the denominator of the optimizer step. The
            step's loss is ``sum loss / sum denominator`` over all its comparisons, however they are cut; without it,
            their mean. An objective that gives one needs its ``own_denominator``.
        having: ``[b]`` by a metric's name, 1 where a comparison has the metric and 0 where it has not, such as the
            reward of a chosen response where there is only a rejected one; every comparison has those not named.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    denominator: Tensor | None = None
    having: Mapping[str, Tensor] | None = None

    @property
    def whole(self) -> Tensor:
        """The loss of an optimizer step of these comparisons alone.  -> []"""
        return self.loss.mean() if self.denominator is None else self.loss.sum() / self.denominator.sum()


class ObjectiveModule(NamedTuple):
    """A module of an objective that trains with the policy.

    Attributes:
        module: The objective has the same one.
        learning_rate: Its own; None is the policy's.
        weight_decay: Its own.
    """

    module: nn.Module
    learning_rate: float | None
    weight_decay: float


class Objective(Protocol):
    """Per-token log-probabilities, weights and reference to one loss per comparison.

    One that needs more than log-probabilities and weights says so by ``needs``, a class attribute or a property:
    ``needs = Needs(reference=True, pairwise=True)``; see :class:`tokenward.tokens.batches.Needs`.

    One with a module to train has a method ``make_module(width, layers) -> ObjectiveModule | None``, which makes that module
    for a policy of so many layers and hidden states of that width; it is called once, before the training.
    """

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """Losses of a batch.

        Args:
            logp: ``[n]`` log-probabilities under the policy, 0 at tokens without weight; rewards where a
                token reward model is trained.
            batch: The tokens, their owners, weights and reference.
        """
        ...


def title_of(objective: Objective) -> str:
    """What a message calls an objective: a custom one as the recipe has it, else the class."""
    return getattr(objective, "title", "") or type(objective).__name__


def needs_of(objective: Objective) -> Needs:
    """What an objective needs; without ``needs``, log-probabilities and weights alone.

    Raises:
        UserError: ``needs`` is something else, or a custom class has the flags of earlier versions.
    """
    old = _old_flags(objective)
    if old:
        written = " and ".join(f"{name} = {value!r}" for name, value in old.items())
        needs = Needs(**{name.removeprefix("needs_"): value for name, value in old.items()})
        raise UserError(
            f"{title_of(objective)} says {written}. What an objective needs is now one value. Write needs = {needs} in the class, "
            "with from tokenward.objectives import Needs."
        )
    if hasattr(objective, "auxiliary"):
        raise UserError(
            f"{title_of(objective)} has a method auxiliary. It is now called make_module, and returns an ObjectiveModule. Rename it."
        )
    found = getattr(objective, "needs", NOTHING)
    if not isinstance(found, Needs):
        raise UserError(
            f"{title_of(objective)} has needs = {found!r}. Write needs = Needs(reference=True), with from tokenward.objectives import "
            "Needs."
        )
    return found


def _old_flags(objective: Objective) -> dict[str, Any]:
    """Flags that are set by the names that they had before there was :class:`Needs`."""
    plain = ("pairwise", "own_denominator", "unpaired", "draws")
    names = [*(f"needs_{item.name}" for item in fields(Needs)), *plain]
    values = {name: getattr(objective, name, None) for name in names}
    # A custom class may have a setting of one of these names, such as a number of draws.
    return {
        name: value for name, value in values.items() if value is True or (value and isinstance(value, str))
    }


class Composite:
    """An objective that calls others: it needs what any of them needs.

    Args:
        parts: The others.

    Attributes:
        needs: Of all of them together.

    Raises:
        UserError: two of them need KL divergences of different directions, and a pass gives one.
    """

    def __init__(self, parts: Sequence[Objective]) -> None:
        self.parts = tuple(parts)
        self.needs = reduce(or_, map(needs_of, self.parts)) if self.parts else NOTHING


def parts_within(objective: Objective) -> Iterator[Objective]:
    """An objective and every one that it calls, at any depth."""
    yield objective
    for part in getattr(objective, "parts", ()):
        yield from parts_within(part)


def has_module(objective: Objective) -> bool:
    """Whether an objective, or one that it calls, may have a module to train."""
    return any(hasattr(part, "make_module") for part in parts_within(objective))


def modules_of(objective: Objective, width: int, layers: int) -> list[ObjectiveModule]:
    """The modules that an objective, and those that it calls, train with the policy; each is made anew.

    Args:
        objective: The objective; it remembers its module.
        width: Of the hidden states.
        layers: Of the policy.
    """
    made = [
        part.make_module(width, layers)  # type: ignore[attr-defined]
        for part in parts_within(objective)
        if hasattr(part, "make_module")
    ]
    return [item for item in made if item is not None]
