"""What a scorer reads: named values of each response token, and which model gives them."""

import hashlib
import json
from typing import Any, NamedTuple

from tokenward.errors import UserError

KINDS = ("logp", "entropy", "rank", "attention", "similarity", "activation", "critical")
"""What a language model gives of a token: its log-probability, the entropy where it was predicted, its rank there (0
is the most probable), the attention it receives, its likeness to words of a domain, its mean activation, and whether
what is written goes wrong with another token in its place."""

IN_THE_STEP = ("logp", "entropy")
"""Kinds that the policy's own pass has while it trains."""

TAKEN = ("policy", "reference", "oracle", "reward", "data")
"""Names that no expert of a recipe may have."""


class Value(NamedTuple):
    """One number per response token.

    Attributes:
        model: ``policy``, ``reference``, ``oracle``, ``reward``, an expert's name, or ``data``.
        kind: One of :data:`KINDS`; empty for the reward, ``spans`` or ``file`` of the data.
        details: Settings on which it depends, by name.
    """

    model: str
    kind: str = ""
    details: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Its name in a record and in the store: ``reference_logp``; settings are told apart by a short hash."""
        plain = f"{self.model}_{self.kind}" if self.kind else self.model
        if not self.details:
            return plain
        return f"{plain}_{hashlib.sha256(json.dumps(self.details).encode()).hexdigest()[:6]}"

    @property
    def online(self) -> bool:
        """Whether it comes from the policy as it is in the step."""
        return self.model == "policy"

    def setting(self, name: str) -> Any:
        """One of its settings."""
        return dict(self.details)[name]


def value_of(read: "str | Value") -> Value:
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
        f"reference, oracle or one of the recipe's experts, KIND one of {', '.join(KINDS)}."
    )


def reads_of(scorer: Any) -> list[Value]:
    """The values that a scorer reads; one that does not say reads what an oracle gives."""
    return [value_of(read) for read in getattr(scorer, "reads", ("oracle_logp", "reference_logp"))]


def is_online(scorer: Any) -> bool:
    """Whether a scorer's scores depend on the policy as it is in the step."""
    return any(value.online for value in reads_of(scorer))


def scope_of_scores(scorer: Any) -> str:
    """Which responses must be seen together to score one: ``response``, ``comparison`` or ``dataset``."""
    return str(getattr(scorer, "scope", "response"))
