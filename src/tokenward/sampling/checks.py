"""What sampling refuses: replies of a sampler of one's own that are none, and temperatures no number holds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from tokenward.errors import UserError
from tokenward.sampling.sampler import Reply, Sampler

COLDEST = 1e-30
"""Lower temperatures make numbers of logits that float32 cannot hold."""


def check_temperature(value: float, key: str) -> None:
    """Refuse a temperature by which no logit can be divided.

    Raises:
        UserError: it is too low for float32.
    """
    if value < COLDEST:
        raise UserError(
            f"{key} is {value:g}, and a logit divided by it is more than float32 holds. Write {COLDEST:g} or more; top_k: 1 "
            "always takes the likeliest token."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedSampler:
    """A sampler with a check of what it returns; empty replies, which teach nothing, are left out.

    Attributes:
        sampler: What draws.
        name: As the recipe has it, for messages.
        vocabulary: Rows of the policy's embedding.
    """

    sampler: Sampler
    name: str
    vocabulary: int

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        count: int,
        seed: int,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Reply]]:
        """See :class:`tokenward.sampling.Sampler`; a group may have fewer replies, but at least one.

        Raises:
            UserError: what came back is not ``count`` replies to each prompt.
        """
        returned: Any = self.sampler(prompts, count=count, seed=seed, progress=progress)
        if not isinstance(returned, list | tuple) or not all(isinstance(g, list | tuple) for g in returned):
            raise self._error(f"{_shown(returned)}, which is no list of lists of Reply")
        if len(returned) != len(prompts):
            raise self._error(f"{len(returned)} groups of replies for {len(prompts)} prompts")
        return [self._group(number, group, count) for number, group in enumerate(returned)]

    def _group(self, number: int, group: Sequence[Any], count: int) -> list[Reply]:
        if len(group) != count:
            raise self._error(f"{len(group)} replies to prompt {number}, where it was asked for {count}")
        replies = [self._reply(f"reply {place} to prompt {number}", item) for place, item in enumerate(group)]
        kept = [reply for reply in replies if reply.ids]
        if not kept:
            raise self._error(f"nothing to learn from: all {count} replies to prompt {number} are empty")
        return kept

    def _reply(self, place: str, reply: Any) -> Reply:
        if not isinstance(reply, Reply) or not isinstance(reply.text, str):
            raise self._error(f"what is no reply: {place} is {_shown(reply)}")
        wrong = [
            item for item in reply.ids if not isinstance(item, Integral) or not 0 <= item < self.vocabulary
        ]  # type: ignore[operator]
        if wrong:
            raise self._error(
                f"a token that the policy does not know: {place} holds the id {wrong[0]}, and ids are whole numbers from "
                f"0 to {self.vocabulary - 1}"
            )
        return Reply([int(item) for item in reply.ids], reply.text, bool(reply.ended))

    def _error(self, problem: str) -> UserError:
        return UserError(
            f"online.sampler {self.name} returned {problem}. It must return a list for each prompt, in their order, with "
            "count times Reply(ids, text, ended) of tokenward.sampling."
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return (
        f"{text if len(text) <= 60 else text[:57] + '...'}" if value is None else f"a {type(value).__name__}"
    )
