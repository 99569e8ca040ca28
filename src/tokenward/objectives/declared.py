"""Whether an objective asks for everything that it reads: tried on two small pairs before anything is trained."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.objectives.base import (
    Objective,
    auxiliaries,
    needs_entropy,
    needs_kl,
    needs_reference,
    needs_reference_layers,
    needs_scores,
    needs_states,
    needs_token_rank,
    title_of,
)
from tokenward.tokens.batches import TokenBatch

LENGTHS = (3, 2, 2, 4)
"""Tokens of the responses of two pairs."""


class _Asked(NamedTuple):
    """How a class asks for something, and what it then has.

    Attributes:
        asks: Whether it does.
        written: What its class says.
        shape: Of the value, beside the tokens: ``"w"`` for a width, ``"lw"`` for layers of it.
    """

    asks: Any
    written: str
    shape: str = ""


ASKED = {
    "reference_logp": _Asked(needs_reference, "needs_reference = True"),
    "entropy": _Asked(needs_entropy, "needs_entropy = True"),
    "token_rank": _Asked(needs_token_rank, "needs_token_rank = True"),
    "kl": _Asked(needs_kl, 'needs_kl = "forward", or "reverse",'),
    "states": _Asked(needs_states, "needs_states = True", "w"),
    "reference_layers": _Asked(needs_reference_layers, "needs_reference_layers = True", "lw"),
    "scores": _Asked(needs_scores, "needs_scores = True"),
}
"""What a batch has only for an objective that asks for it."""


def check_declared(objective: Objective, *, width: int = 4, layers: int = 2) -> None:
    """Refuse an objective that reads what it does not ask for: in a training it would find None there.

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
            remedy = " and ".join(ASKED[name].written.rstrip(",") for name in missing)
            read = " and ".join(f"batch.{name}" for name in missing)
            raise UserError(
                f"the objective {title} reads {read}, which is there only for one that asks for it. Write {remedy} in the class."
            )


def _callable_parts(objective: Objective, title: str = "") -> Iterator[tuple[str, Objective]]:
    """Those that call no other, with what a message calls them."""
    parts = getattr(objective, "parts", ())
    title = getattr(objective, "title", title) if len(parts) <= 1 else ""
    if not parts and callable(objective):
        yield title or title_of(objective), objective
    for part in parts:
        yield from _callable_parts(part, title)


def _missing(objective: Objective, width: int, layers: int) -> list[str]:
    """What it reads and does not ask for."""
    try:
        objective = deepcopy(objective)
        auxiliaries(objective, width, layers)
    except Exception:  # whatever a class of one's own raises there
        return []
    sizes = {"": (), "w": (width,), "lw": (layers, width)}
    known = {name: torch.rand(sum(LENGTHS), *sizes[asked.shape]) for name, asked in ASKED.items()}
    unasked = [name for name, asked in ASKED.items() if not asked.asks(objective)]
    if _works(objective, _without(known, unasked)) or not _works(objective, known):
        return []
    return [name for name in unasked if not _works(objective, _without(known, [name]))]


def _without(known: Mapping[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    return {name: value for name, value in known.items() if name not in names}


def _works(objective: Objective, known: Mapping[str, Tensor]) -> bool:
    logp = (-torch.rand(sum(LENGTHS)) - 0.1).requires_grad_()
    try:
        objective(logp, replace(_two_pairs(), **known))  # type: ignore[arg-type]
    except Exception:  # whatever a class of one's own raises where it finds None
        return False
    return True


def _two_pairs() -> TokenBatch:
    lengths = torch.tensor(LENGTHS)
    count, places = int(lengths.sum()), torch.arange(int(lengths.sum()))
    response = torch.repeat_interleave(torch.arange(len(LENGTHS)), lengths)
    return TokenBatch(
        input_ids=places[None],
        position_ids=places[None],
        attention_mask=torch.ones_like(places)[None],
        predicted_from=places,
        placed_at=places,
        ids=places,
        response=response,
        comparison=torch.tensor([0, 0, 1, 1]),
        rank=torch.tensor([0, 1, 0, 1]),
        weights=torch.ones(count),
        kept=places,
        eos=places == lengths.cumsum(0)[response] - 1,
    )
