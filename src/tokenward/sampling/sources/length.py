"""A control: what a policy learns from length alone."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from tokenward.errors import UserError


@dataclass(frozen=True, slots=True)
class Length:
    """The nearer to a number of words, the better: ``-|words of the reply - words|``.

    Attributes:
        words: Number of words wanted, split at white space.
    """

    _: KW_ONLY
    words: int

    def __post_init__(self) -> None:
        if self.words < 0:
            raise UserError(
                f"words is {self.words}, a length that no reply has. Write how many are wanted: 50."
            )

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] = (),
        **columns: Sequence[Any],
    ) -> list[float]:
        """One number <= 0 per completion."""
        return [-float(abs(len(text.split()) - self.words)) for text in completions]
