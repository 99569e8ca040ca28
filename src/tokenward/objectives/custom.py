"""Checks of custom objectives: what they ask for and read, and what they return."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.objectives.base import Composite, Losses, Objective, modules_of, needs_of, title_of
from tokenward.ops.logprob import STATISTICS
from tokenward.tokens.batches import TokenBatch

LENGTHS = (3, 2, 2, 4)
"""Tokens of the responses of two pairs."""


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
            _check_denominator(self.title, losses, batch.comparisons, announced=self.needs.own_denominator)
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
            f"the objective {name} {did}: what divides a step must be known before it begins. Write needs = Needs(own_denominator=True) in "
            "the class and return Losses(loss, metrics, denominator), or leave both out for the mean over comparisons."
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


def check_declared(objective: Objective, *, width: int = 4, layers: int = 2) -> None:
    """Refuse an objective that reads what it does not need: in a training it would not be there.

    A copy is tried, so that one which counts its calls, or has modules, begins as it was. An objective that fails whatever
    the batch has, or cannot be copied, is left to the training, which says where.

    Args:
        objective: Each one that it calls is looked at by itself.
        width: Of the hidden states.
        layers: Of the policy.

    Raises:
        UserError: as above; names what is read.
    """
    for title, part in _callable_parts(objective):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            missing = _missing(part, width, layers)
        if missing:
            asked: dict[str, Any] = {name: "forward" if name == "kl" else True for name in missing}
            written = replace(needs_of(part), **asked)
            read = " and ".join(map(_as_read, missing))
            other = ", or kl='reverse'" if "kl" in missing else ""
            raise UserError(
                f"the objective {title} reads {read}, which is there only for one that needs it. Write needs = {written}{other} in the "
                "class."
            )


def _callable_parts(objective: Objective, title: str = "") -> Iterator[tuple[str, Objective]]:
    """Those that call no other, with what a message calls them."""
    parts = getattr(objective, "parts", ())
    title = getattr(objective, "title", title) if len(parts) <= 1 else ""
    if not parts:
        yield title or title_of(objective), objective
    for part in parts:
        yield from _callable_parts(part, title)


def _as_read(name: str) -> str:
    return {"reference": "batch.reference_logp", "scores": "batch.scores"}.get(
        name, f"batch.statistics[{name!r}]"
    )


def _missing(objective: Objective, width: int, layers: int) -> list[str]:
    """What it reads and does not need, by the names of the fields of :class:`tokenward.tokens.batches.Needs`."""
    try:
        objective = deepcopy(objective)
        modules_of(objective, width, layers)
    except Exception:  # whatever a custom class raises there
        return []
    shapes = {"states": (width,), "reference_layers": (layers, width)}
    names = ("reference", "scores", *STATISTICS, *shapes)
    known = {name: torch.rand(sum(LENGTHS), *shapes.get(name, ())) for name in names}
    needs = needs_of(objective)
    unasked = [name for name in names if not getattr(needs, name)]
    if _works(objective, known, unasked) or not _works(objective, known):
        return []
    return [name for name in unasked if not _works(objective, known, [name])]


def _works(objective: Objective, known: Mapping[str, Tensor], without: Sequence[str] = ()) -> bool:
    logp = (-torch.rand(sum(LENGTHS)) - 0.1).requires_grad_()
    given = {name: value for name, value in known.items() if name not in without}
    stored = {"reference_logp": given.pop("reference", None), "scores": given.pop("scores", None)}
    try:
        objective(logp, replace(_two_pairs(), **stored, statistics=given))  # type: ignore[arg-type]
    except Exception:  # whatever a custom class raises where something is missing
        return False
    return True


def _two_pairs() -> TokenBatch:
    lengths = torch.tensor(LENGTHS)
    count, places = int(lengths.sum()), torch.arange(int(lengths.sum()))
    response = torch.repeat_interleave(torch.arange(len(LENGTHS)), lengths)
    return TokenBatch(
        ids=places,
        response=response,
        comparison=torch.tensor([0, 0, 1, 1]),
        rank=torch.tensor([0, 1, 0, 1]),
        weights=torch.ones(count),
        kept=places,
        eos=places == lengths.cumsum(0)[response] - 1,
    )
