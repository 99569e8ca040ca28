"""Checks of sampling: what a custom sampler returns, and temperatures too low for float32."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from tokenward.errors import UserError
from tokenward.sampling.sampler import Reply, Sampler

COLDEST = 1e-30
"""Logits divided by a lower temperature overflow float32."""


def check_temperature(value: float, key: str) -> None:
    """Reject a temperature that logits cannot be divided by."""
    if value < COLDEST:
        raise UserError(
            f"the temperature {value:g} is too low: logits divided by it overflow float32. Use {COLDEST:g} or more, or top_k 1 "
            "to always take the most likely token.",
            code="invalid-setting",
            key=key,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedSampler:
    """A custom sampler whose replies are checked; empty replies, which teach nothing, are dropped.

    ``name`` is the sampler's in the recipe, for errors; ``vocabulary`` is the number of rows of the policy's embedding.
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
            UserError: the sampler does not return ``count`` valid replies to each prompt.
        """
        returned: Any = self.sampler(prompts, count=count, seed=seed, progress=progress)
        if not isinstance(returned, list | tuple) or not all(isinstance(g, list | tuple) for g in returned):
            raise self._error(f"a {type(returned).__name__} that is not a list of lists of Reply")
        if len(returned) != len(prompts):
            raise self._error(f"{len(returned)} groups of replies for {len(prompts)} prompts")
        return [self._group(number, group, count) for number, group in enumerate(returned)]

    def _group(self, number: int, group: Sequence[Any], count: int) -> list[Reply]:
        if len(group) != count:
            raise self._error(f"{len(group)} replies to prompt {number} instead of {count}")
        replies = [self._reply(f"reply {place} to prompt {number}", item) for place, item in enumerate(group)]
        kept = [reply for reply in replies if reply.ids]
        if not kept:
            raise self._error(f"nothing to learn from: all {count} replies to prompt {number} are empty")
        return kept

    def _reply(self, place: str, reply: Any) -> Reply:
        if not isinstance(reply, Reply) or not isinstance(reply.text, str):
            raise self._error(f"something that is not a Reply: {place} is a {type(reply).__name__}")
        for item in reply.ids:
            if not isinstance(item, Integral) or not 0 <= int(item) < self.vocabulary:
                raise self._error(
                    f"a token that the policy does not know: {place} holds the id {item}, but ids are integers from "
                    f"0 to {self.vocabulary - 1}"
                )
        return Reply([int(item) for item in reply.ids], reply.text, bool(reply.ended))

    def _error(self, problem: str) -> UserError:
        return UserError(
            f"the sampler {self.name} returned {problem}. It must return, for each prompt in order, a list of count "
            "tokenward.sampling.Reply(ids, text, ended).",
            code="wrong-replies",
            key="online.sampler",
        )
