"""What an objective receives and what it returns."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

from torch import Tensor, nn

from tokenward.errors import UserError
from tokenward.tokens.batches import TokenBatch

Direction = Literal["", "forward", "reverse"]
"""Which KL divergence an objective reads: none, KL(reference || policy), or KL(policy || reference)."""

Unpaired = Literal["", "good", "all"]
"""Which comparisons of one response an objective trains on: none, those whose response is good, or all."""


DRAW = "draw"
"""In ``batch.values`` while an objective that ``draws`` trains: one number, another one in each optimizer step."""


class Losses(NamedTuple):
    """Unreduced result of an objective.

    Attributes:
        loss: ``[b]``, one per comparison.
        metrics: Named values ``[b]``, with TRL's names where TRL has them.
        denominator: ``[b]``, 0 or more, or None: what each comparison adds to the denominator of the optimizer step. The
            step's loss is ``sum loss / sum denominator`` over all its comparisons, however they are cut; without it,
            their mean. An objective that gives one says ``own_denominator``.
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


class Auxiliary(NamedTuple):
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

    One may have flags, as class attributes or properties; a flag that is not there is False:
    ``needs_reference`` (``batch.reference_logp`` must be there), ``needs_entropy`` (``batch.entropy`` must),
    ``needs_token_rank`` (``batch.token_rank`` must),
    ``needs_kl`` (``batch.kl`` must: ``"forward"`` or ``"reverse"``), ``needs_states`` (``batch.states`` must),
    ``needs_reference_layers`` (``batch.reference_layers`` must), ``needs_scores`` (``batch.scores`` must), ``pairwise``
    (every comparison must have exactly two responses, the better one first), ``own_denominator``
    (:class:`Losses` have a ``denominator``), ``unpaired`` (a comparison may have one response of rank 0, which is
    good, or 1, which is bad: ``"all"``, or ``"good"`` where a bad one alone teaches nothing), and ``draws`` (it draws by
    ``batch.values[DRAW]`` and the responses' ids, so that the draws of a step do not depend on how it is cut).

    One with a module to train has a method ``auxiliary(width, layers) -> Auxiliary | None``, which makes that module
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
    """What a message calls an objective: one of one's own as the recipe has it, else the class."""
    return getattr(objective, "title", "") or type(objective).__name__


class Composite:
    """An objective that calls others: it needs what any of them needs.

    Args:
        parts: The others.

    Raises:
        UserError: two of them need KL divergences of different directions, and a pass gives one.
    """

    def __init__(self, parts: Sequence[Objective]) -> None:
        self.parts = tuple(parts)
        directions = sorted({needs_kl(part) for part in parts} - {""})
        if len(directions) > 1:
            raise UserError(
                "one objective asks for the forward KL divergence and another for the reverse one; a pass gives one of them. "
                "Give both the same direction."
            )

    @property
    def needs_reference(self) -> bool:
        """See :class:`Objective`."""
        return any(map(needs_reference, self.parts))

    @property
    def needs_entropy(self) -> bool:
        """See :class:`Objective`."""
        return any(map(needs_entropy, self.parts))

    @property
    def needs_token_rank(self) -> bool:
        """See :class:`Objective`."""
        return any(map(needs_token_rank, self.parts))

    @property
    def needs_kl(self) -> Direction:
        """See :class:`Objective`."""
        for part in self.parts:
            if direction := needs_kl(part):
                return direction
        return ""

    @property
    def needs_states(self) -> bool:
        """See :class:`Objective`."""
        return any(map(needs_states, self.parts))

    @property
    def needs_reference_layers(self) -> bool:
        """See :class:`Objective`."""
        return any(map(needs_reference_layers, self.parts))

    @property
    def needs_scores(self) -> bool:
        """See :class:`Objective`."""
        return any(map(needs_scores, self.parts))

    @property
    def pairwise(self) -> bool:
        """See :class:`Objective`."""
        return any(map(is_pairwise, self.parts))

    @property
    def own_denominator(self) -> bool:
        """See :class:`Objective`."""
        return any(map(has_own_denominator, self.parts))

    @property
    def unpaired(self) -> Unpaired:
        """See :class:`Objective`."""
        found = {unpaired_of(part) for part in self.parts}
        return "" if "" in found or not found else "all" if "all" in found else "good"


def parts_within(objective: Objective) -> Iterator[Objective]:
    """An objective and every one that it calls, at any depth."""
    yield objective
    for part in getattr(objective, "parts", ()):
        yield from parts_within(part)


def needs_reference(objective: Objective) -> bool:
    """Whether an objective reads ``batch.reference_logp``."""
    return bool(getattr(objective, "needs_reference", False))


def needs_entropy(objective: Objective) -> bool:
    """Whether an objective reads ``batch.entropy``."""
    return bool(getattr(objective, "needs_entropy", False))


def needs_token_rank(objective: Objective) -> bool:
    """Whether an objective reads ``batch.token_rank``."""
    return bool(getattr(objective, "needs_token_rank", False))


def needs_kl(objective: Objective) -> Direction:
    """Which KL divergence to the frozen reference an objective reads from ``batch.kl``, or "" for none.

    Raises:
        UserError: a class of one's own names another direction.
    """
    direction = getattr(objective, "needs_kl", "") or ""
    if direction not in ("", "forward", "reverse"):
        raise UserError(
            f"{title_of(objective)} says needs_kl {direction!r}. Write forward for KL(reference || policy), or reverse for "
            "KL(policy || reference)."
        )
    return direction


def needs_states(objective: Objective) -> bool:
    """Whether an objective reads ``batch.states``."""
    return bool(getattr(objective, "needs_states", False))


def needs_reference_layers(objective: Objective) -> bool:
    """Whether an objective reads ``batch.reference_layers``."""
    return bool(getattr(objective, "needs_reference_layers", False))


def needs_scores(objective: Objective) -> bool:
    """Whether an objective reads ``batch.scores``, the stored scores or rewards of the tokens."""
    return bool(getattr(objective, "needs_scores", False))


def needs_frozen_reference(objective: Objective) -> bool:
    """Whether an objective needs the reference model itself beside the policy, not only stored values of it."""
    return bool(needs_kl(objective)) or needs_reference_layers(objective)


def is_pairwise(objective: Objective) -> bool:
    """Whether an objective is over pairs, the better response first."""
    return bool(getattr(objective, "pairwise", False))


def has_own_denominator(objective: Objective) -> bool:
    """Whether an objective says by ``Losses.denominator`` what the losses of an optimizer step are divided by."""
    return bool(getattr(objective, "own_denominator", False))


def unpaired_of(objective: Objective) -> Unpaired:
    """Which comparisons of one response an objective trains on."""
    return getattr(objective, "unpaired", "") or ""


def has_auxiliary(objective: Objective) -> bool:
    """Whether an objective, or one that it calls, may have a module to train."""
    return hasattr(objective, "auxiliary") or any(map(has_auxiliary, getattr(objective, "parts", ())))


def auxiliaries(objective: Objective, width: int, layers: int) -> list[Auxiliary]:
    """The modules that an objective, and those that it calls, train with the policy; each is made anew.

    Args:
        objective: The objective; it remembers its module.
        width: Of the hidden states.
        layers: Of the policy.
    """
    made = objective.auxiliary(width, layers) if hasattr(objective, "auxiliary") else None  # type: ignore[attr-defined]
    found = [] if made is None else [made]
    return found + [
        item for part in getattr(objective, "parts", ()) for item in auxiliaries(part, width, layers)
    ]
