"""Checks of custom objectives: of what they return, and that they declare what they read."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenward.errors import UserError, no_exit
from tokenward.objectives.base import Composite, Losses, Objective, modules_of, needs_of, title_of
from tokenward.ops.logprob import STATISTICS
from tokenward.tokens.batches import TokenBatch

_LENGTHS = (3, 2, 2, 4)
"""Tokens of the responses of the two pairs on which an objective is tried."""


class CheckedObjective(Composite):
    """An objective whose first result is checked; ``name`` is its name in the recipe, for messages."""

    def __init__(self, objective: Objective, name: str) -> None:
        super().__init__([objective])
        self._objective, self.title, self._checked = objective, name, False

    def __call__(self, logp: Tensor, batch: TokenBatch) -> Losses:
        """The objective's losses.

        Raises:
            UserError: The first result is not a :class:`Losses` with one number per comparison, or its denominator does not
                agree with ``needs``.
        """
        with no_exit("objective", self.title):
            losses = self._objective(logp, batch)
        if not self._checked:
            _check_losses(self.title, losses, batch.comparisons)
            _check_denominator(self.title, losses.denominator, batch.comparisons, self.needs.own_denominator)
            self._checked = True
        return losses


def _check_losses(name: str, losses: Any, comparisons: int) -> None:
    if not isinstance(losses, Losses):
        raise UserError(
            f"the objective {name} returned {_describe(losses)}, but must return Losses of tokenward.objectives. Write "
            "return Losses(loss, {}), with one loss per comparison that is not reduced.",
            code="wrong-result",
        )
    if not isinstance(losses.metrics, Mapping):
        raise UserError(
            f"the objective {name} returned {_describe(losses.metrics)} as metrics. Return a dict, such as Losses(loss, {{}}).",
            code="wrong-result",
        )
    for label, value in {"loss": losses.loss, **losses.metrics}.items():
        if not isinstance(value, Tensor) or value.shape != (comparisons,):
            raise UserError(
                f"the objective {name} returned {_describe(value)} as {label} for a batch of {comparisons} comparisons. Return "
                "one number per comparison, not reduced. The responses of a comparison follow each other: of pairs, [0::2] "
                "are the preferred ones and [1::2] the others.",
                code="wrong-result",
            )


def _check_denominator(name: str, found: Any, comparisons: int, announced: bool) -> None:
    if announced != (found is not None):
        problem = "declares own_denominator but returned none" if announced else "returned a denominator"
        raise UserError(
            f"the objective {name} {problem}: what divides a step must be known before it begins. Declare needs = "
            "Needs(own_denominator=True) and return Losses(loss, metrics, denominator), or do neither to get the mean over "
            "comparisons.",
            code="wrong-result",
        )
    if announced and not (
        isinstance(found, Tensor) and found.shape == (comparisons,) and bool((found >= 0).all())
    ):
        raise UserError(
            f"the objective {name} returned {_describe(found)} as denominator for a batch of {comparisons} comparisons. Return "
            "one number >= 0 per comparison, such as its number of tokens.",
            code="wrong-result",
        )


def _describe(value: Any) -> str:
    shape = f" of shape {[*value.shape]}" if isinstance(value, Tensor) else ""
    return f"a {type(value).__name__}{shape}"


def check_declared(objective: Objective, *, width: int = 4, layers: int = 2) -> None:
    """Check that an objective reads only what it declares as ``needs``; in training the rest would be missing.

    A copy is called with a small batch, so the objective itself does not change; the parts of a sum are tried one by one.
    An objective that fails for another reason, or cannot be copied, passes; the training then shows the error.

    Raises:
        UserError: Something is read and not declared.
    """
    for title, part in _leaf_parts(objective):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            missing = _undeclared(part, width, layers)
        if missing:
            declared: dict[str, Any] = {name: "forward" if name == "kl" else True for name in missing}
            other = ", or kl='reverse'," if "kl" in missing else ""
            raise UserError(
                f"the objective {title} reads {' and '.join(map(_expression, missing))}, which it does not declare. Write "
                f"needs = {replace(needs_of(part), **declared)}{other} in the class.",
                code="undeclared-value",
            )


def _leaf_parts(objective: Objective, title: str = "") -> Iterator[tuple[str, Objective]]:
    """The objectives that call no other, with their names for messages."""
    parts = getattr(objective, "parts", ())
    # A wrapper's title names its only part; the parts of a sum go by their own.
    title = getattr(objective, "title", title) if len(parts) <= 1 else ""
    if not parts:
        yield title or title_of(objective), objective
    for part in parts:
        yield from _leaf_parts(part, title)


def _expression(name: str) -> str:
    names = {"reference": "batch.reference_logp", "scores": "batch.scores"}
    return names.get(name, f"batch.statistics[{name!r}]")


def _undeclared(objective: Objective, width: int, layers: int) -> list[str]:
    """The fields of :class:`tokenward.tokens.batches.Needs` that an objective reads but does not declare."""
    try:
        objective = deepcopy(objective)
        modules_of(objective, width, layers)
    except (Exception, SystemExit):  # a custom class may raise anything
        return []
    shapes = {"states": (width,), "reference_layers": (layers, width)}
    names = ("reference", "scores", *STATISTICS, *shapes)
    known = {name: torch.rand(sum(_LENGTHS), *shapes.get(name, ())) for name in names}
    needs = needs_of(objective)
    undeclared = [name for name in names if not getattr(needs, name)]
    if _works(objective, known, undeclared) or not _works(objective, known):
        return []
    return [name for name in undeclared if not _works(objective, known, [name])]


def _works(objective: Objective, known: Mapping[str, Tensor], without: Sequence[str] = ()) -> bool:
    """Whether an objective can be called with a batch that lacks some values."""
    logp = (-torch.rand(sum(_LENGTHS)) - 0.1).requires_grad_()
    given = {name: value for name, value in known.items() if name not in without}
    stored = {"reference_logp": given.pop("reference", None), "scores": given.pop("scores", None)}
    try:
        objective(logp, replace(_two_pairs(), **stored, statistics=given))  # type: ignore[arg-type]
    except (Exception, SystemExit):  # a custom class may raise anything when a value is missing
        return False
    return True


def _two_pairs() -> TokenBatch:
    lengths = torch.tensor(_LENGTHS)
    places = torch.arange(sum(_LENGTHS))
    response = torch.repeat_interleave(torch.arange(len(_LENGTHS)), lengths)
    return TokenBatch(
        ids=places,
        response=response,
        comparison=torch.tensor([0, 0, 1, 1]),
        rank=torch.tensor([0, 1, 0, 1]),
        weights=torch.ones(len(places)),
        kept=places,
        eos=places == lengths.cumsum(0)[response] - 1,
    )
