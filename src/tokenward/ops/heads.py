"""What a language model head is: a matrix, a bias, and what the model does to its logits."""

from typing import Literal, NamedTuple

from torch import Tensor

from tokenward.ops.logprob import wide


class LogitStep(NamedTuple):
    """One thing that models do to each logit.

    Attributes:
        kind: ``times`` and ``over`` the number, or ``cap``: ``number * tanh(logit / number)``.
        number: As the model's config has it.
    """

    kind: Literal["times", "over", "cap"]
    number: float

    def __call__(self, logits: Tensor) -> Tensor:
        """The logits after it, in the number type that they have, as the model rounds them.  [n v] -> [n v]"""
        if self.kind == "times":
            return logits * self.number
        over = logits / self.number
        return over if self.kind == "over" else over.tanh() * self.number


class LogitChange(NamedTuple):
    """What a model does to its head's logits; nothing where there are no steps.

    Attributes:
        steps: One after another.
        widened: Whether the logits are put into float32 first. A sum over the vocabulary always is.
    """

    steps: tuple[LogitStep, ...] = ()
    widened: bool = False

    def __call__(self, logits: Tensor) -> Tensor:
        """The model's logits of its head's.  [n v] -> [n v]"""
        logits = wide(logits) if self.widened else logits
        for step in self.steps:
            logits = step(logits)
        return logits


UNCHANGED = LogitChange()
"""Most models hand their head's logits on."""


class LinearHead(NamedTuple):
    """The weights of a linear language model head.

    Attributes:
        weight: ``[v d]``.
        bias: ``[v]`` or None.
        change: What becomes of its logits.
    """

    weight: Tensor
    bias: Tensor | None = None
    change: LogitChange = UNCHANGED


class Reference(NamedTuple):
    """The model to which a KL divergence is taken; it gets no gradient.

    Attributes:
        hidden: ``[n d]``, its hidden states at the same positions.
        head: Its head, over the same vocabulary.
    """

    hidden: Tensor
    head: LinearHead
