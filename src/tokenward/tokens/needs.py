"""What an objective needs of its batch and of the model's pass, as one value."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from tokenward.errors import UserError
from tokenward.ops.logprob import STATISTICS, Direction

Unpaired = Literal["good", "all"]
"""Which comparisons of one response an objective trains on: those whose response is good, or all."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Needs:
    """What an objective needs. Two are merged with ``|``.

    Attributes:
        reference: ``batch.reference_logp [n]``, the stored log-probabilities under the reference.
        scores: ``batch.scores [n]``, the stored scores or rewards of the tokens.
        entropy: ``batch.statistics["entropy"] [n]``, nats: the entropy of the policy's whole distribution where the token
            was predicted, with its gradient.
        token_rank: ``batch.statistics["token_rank"] [n]``: how many tokens the policy found more probable.
        kl: ``batch.statistics["kl"] [n]``, nats: the KL divergence over the whole vocabulary, with its gradient.
            ``"forward"`` is KL(reference || policy), ``"reverse"`` KL(policy || reference).
        states: ``batch.statistics["states"] [n d]``: the policy's last hidden state where the token is predicted, with its
            gradient.
        reference_layers: ``batch.statistics["reference_layers"] [n L d]``: the output of each layer of the frozen
            reference there.
        pairwise: Every comparison has exactly two responses, the better one first.
        own_denominator: Its :class:`tokenward.objectives.base.Losses` have a ``denominator``.
        unpaired: Comparisons of one response of rank 0, which is good, or 1, which is bad: ``"all"``, or ``"good"`` where a
            bad one alone teaches nothing. None refuses them.
        draws: A random number of the step, ``batch.values[DRAW]``, so that what it draws does not depend on how the step is
            cut.

    Raises:
        UserError: ``kl`` or ``unpaired`` is another word.
    """

    reference: bool = False
    scores: bool = False
    entropy: bool = False
    token_rank: bool = False
    kl: Direction | None = None
    states: bool = False
    reference_layers: bool = False
    pairwise: bool = False
    own_denominator: bool = False
    unpaired: Unpaired | None = None
    draws: bool = False

    def __post_init__(self) -> None:
        if self.kl not in (None, "forward", "reverse"):
            raise UserError(
                f"Needs has kl={self.kl!r}. Write forward for KL(reference || policy), or reverse for KL(policy || reference)."
            )
        if self.unpaired not in (None, "good", "all"):
            raise UserError(
                f"Needs has unpaired={self.unpaired!r}. Write all, good for rows whose one response is good, or leave it out."
            )

    def __repr__(self) -> str:
        return f"Needs({', '.join(f'{name}={value!r}' for name, value in self._given().items())})"

    def __or__(self, other: "Needs") -> "Needs":
        """What two objectives need together.

        Both must train on comparisons of one response; a bad one alone trains where one of them learns from it.

        Raises:
            UserError: they need KL divergences of different directions, and a pass gives one.
        """
        if self.kl and other.kl and self.kl != other.kl:
            raise UserError(
                "one objective needs the forward KL divergence and another the reverse one; a pass gives one of them. "
                "Give both the same direction."
            )
        both: dict[str, Any] = self._given() | other._given()
        unpaired: list[Unpaired | None] = [self.unpaired, other.unpaired]
        both["unpaired"] = None if None in unpaired else "all" if "all" in unpaired else "good"
        return Needs(**both)

    @property
    def of_head(self) -> tuple[str, ...]:
        """Names of the statistics that the model's head gives."""
        given = self._given()
        return tuple(name for name in STATISTICS if name in given)

    @property
    def frozen_reference(self) -> bool:
        """Whether the reference model itself is needed beside the policy, not only stored values of it."""
        return self.kl is not None or self.reference_layers

    def _given(self) -> dict[str, Any]:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if value}


NOTHING = Needs()
"""Log-probabilities alone."""
