"""What a scorer reads: named values of each response token, and which model gives them."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.plugins import name_of

KINDS = ("logp", "entropy", "rank", "attention", "similarity", "activation", "critical")
"""What a language model gives of a token: its log-probability, the entropy where it was predicted, its rank there (0
is the most probable), the attention it receives, its likeness to words of a domain, its mean activation, and whether
what is written goes wrong with another token in its place."""

IN_THE_STEP = ("logp", "entropy", "rank")
"""Kinds that the policy's own pass has while it trains."""

TAKEN = ("policy", "reference", "oracle", "reward", "data")
"""Names that no auxiliary model of a recipe may have."""


class Value(str):
    """One number per response token; as text it is its name in a record and in the store, such as ``reference_logp``.

    Settings on which a value depends are told apart by a short hash in its name.

    Attributes:
        model: ``policy``, ``reference``, ``oracle``, ``reward``, an auxiliary model's name, or ``data``.
        kind: One of :data:`KINDS`; empty for the reward, ``spans`` or ``file`` of the data.
        details: The settings, by name.
    """

    model: str
    kind: str
    details: Mapping[str, Any]

    def __new__(cls, model: str, kind: str = "", **details: Any) -> Self:
        """A value of a model.

        Args:
            model: Its name.
            kind: What of it.
            details: Settings.
        """
        name = f"{model}_{kind}" if kind else model
        if details:
            name += f"_{hashlib.sha256(json.dumps(details, sort_keys=True).encode()).hexdigest()[:6]}"
        made = super().__new__(cls, name)
        made.model, made.kind, made.details = model, kind, details
        return made

    @property
    def online(self) -> bool:
        """Whether it comes from the policy as it is in the step."""
        return self.model == "policy"


def value_of(read: str) -> Value:
    """What a name such as ``oracle_logp`` or ``reward`` means.

    Raises:
        UserError: it is no such name.
    """
    if isinstance(read, Value):
        return read
    model, _, kind = read.rpartition("_")
    if read == "reward":
        return Value("reward")
    if model and kind in KINDS:
        return Value(model, kind)
    raise UserError(
        f"a scorer reads {read!r}, which is no stored value. Write reward, or MODEL_KIND such as oracle_logp: MODEL is policy, "
        f"reference, oracle or one of the recipe's auxiliary models, KIND one of {', '.join(KINDS)}."
    )


def reads_of(scorer: Any) -> list[Value]:
    """The values that a scorer reads; one that does not say reads what an oracle gives."""
    return [value_of(read) for read in getattr(scorer, "reads", ("oracle_logp", "reference_logp"))]


class MissingValue(UserError):
    """A value that a scorer asks for and that is not there.

    Attributes:
        name: Of the value.
    """

    def __init__(self, name: str, problem: str) -> None:
        """Name the value and the problem."""
        super().__init__(problem)
        self.name = name


def answer_of(scorer: Any, record: Any) -> Any:
    """What a scorer makes of a response.

    Raises:
        UserError: it looks at a value that it does not say it reads, so that nothing made it.
    """
    try:
        return scorer(record)
    except MissingValue as error:
        declared = reads_of(scorer)
        if error.name in declared:
            raise
        value_of(error.name)  # a word that names no value is refused as such
        written = ", ".join(f'"{value}"' for value in [*declared, error.name])
        listed = ", ".join(declared) or "nothing"
        raise UserError(
            f"the scorer {name_of(scorer)} looks at {error.name}, which is not among what it reads ({listed}), so it was not made. Write "
            f"reads = ({written}{',' * (not declared)}) in the class."
        ) from error


def is_online(scorer: Any) -> bool:
    """Whether a scorer's scores depend on the policy as it is in the step."""
    return any(value.online for value in reads_of(scorer))


def scope_of_scores(scorer: Any) -> str:
    """Which responses must be seen together to score one: ``response``, ``comparison`` or ``dataset``."""
    return str(getattr(scorer, "scope", "response"))


def numbers_of(kind: str, made: Any, returned: object) -> Tensor:
    """What a scorer or selector returned, a list or an array too, as float32.

    Raises:
        UserError: it is not a list of numbers.
    """
    try:
        return torch.as_tensor(returned, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:  # torch raises each of them for some values
        raise UserError(
            f"the {kind} {name_of(made)} returned a {type(returned).__name__} that cannot be read as numbers ({error}). Return a "
            "tensor, an array or a list with one number per token."
        ) from error
