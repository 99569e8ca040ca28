"""Scorers that need a look inside a model, or continuations by it; each value is stored like a log-probability."""

from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal

from torch import Tensor

from tokenward.errors import UserError
from tokenward.scoring.basic import Record, ValueOf
from tokenward.scoring.reads import Value


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention that each token receives in one layer: mean over the heads and over the positions that see it.

    The pass is the eager one, which holds ``heads x t x t`` numbers of a row, with a row for each response: several
    times the cost of a pass for log-probabilities. Needed by XTF (arXiv 2602.14536), whose released code averages over
    the other axis, which gives ``1 / t`` everywhere.

    Attributes:
        of: Which model's.
        layer: 0 is the first; -1 the last.
    """

    _: KW_ONLY
    of: str = "reference"
    layer: int = -1

    @property
    def reads(self) -> tuple[Value, ...]:
        """The attention in that layer."""
        return (Value(self.of, "attention", layer=self.layer),)

    def __call__(self, record: Record) -> Tensor:
        """Scores in [0, 1].  -> [n]"""
        return record.value(self.reads[0])


@dataclass(frozen=True, slots=True)
class Similarity:
    """Cosine of a token with the mean of a domain's words (XTF's task relevance).

    Attributes:
        domain: The words.
        of: Which model's vectors.
        space: ``embedding``, the input embedding; ``alone``, the last hidden state of the token run by itself, as XTF's
            released code has it.
    """

    domain: tuple[str, ...]
    _: KW_ONLY
    of: str = "reference"
    space: Literal["embedding", "alone"] = "embedding"

    def __post_init__(self) -> None:
        if not self.domain or not all(word.strip() for word in self.domain):
            raise UserError(
                f'similarity needs the words of a domain, got {list(self.domain)}. Write for example domain: ["+", "=", maths].'
            )

    @property
    def reads(self) -> tuple[Value, ...]:
        """The likeness to these words."""
        return (Value(self.of, "similarity", domain=list(self.domain), space=self.space),)

    def __call__(self, record: Record) -> Tensor:
        """Scores in [-1, 1].  -> [n]"""
        return record.value(self.reads[0])


@dataclass(frozen=True, slots=True)
class Activation(ValueOf):
    """MaPO's mask (arXiv 2410.05102): mean activation of a frozen model where each token was predicted.

    Of MLPs, attention, layers and logits each activation is averaged over its features, standardised over the response
    and brought to [0, 1]; then averaged over the layers of a type, and over the types.

    Attributes:
        of: Which model's.
    """

    kind: ClassVar[str] = "activation"


@dataclass(frozen=True, slots=True)
class Counterfactual:
    """1 at critical tokens: with any other likely token in the place, what follows is wrong (CFT, arXiv 2510.10974).

    At each token of a response that the verifier accepts, the most probable other tokens are written in its place and
    continued greedily; where every continuation fails, the token is critical. In a greedy response these are the second
    and third most probable tokens. A response that is not accepted has no scores. The cost is ``candidates`` replies
    for each token of the data.

    Attributes:
        verifier: ``"module:name"`` of ``f(prompts, completions, **columns)``, a number per completion that is greater
            than 0 where it is right; ``references`` among the columns holds the original response.
        of: Which model continues.
        candidates: Other tokens tried.
        max_new_tokens: Longest continuation.
    """

    verifier: str
    _: KW_ONLY
    of: str = "reference"
    candidates: int = 2
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        if min(self.candidates, self.max_new_tokens) < 1:
            raise UserError(
                f"counterfactual needs candidates and max_new_tokens of 1 or more, got {self.candidates} and "
                f"{self.max_new_tokens}."
            )

    @property
    def reads(self) -> tuple[Value, ...]:
        """Whether the token is critical."""
        details = {
            "verifier": self.verifier,
            "candidates": self.candidates,
            "max_new_tokens": self.max_new_tokens,
        }
        return (Value(self.of, "critical", **details),)

    def __call__(self, record: Record) -> Tensor:
        """Scores, 0 or 1.  -> [n]"""
        return record.value(self.reads[0])
