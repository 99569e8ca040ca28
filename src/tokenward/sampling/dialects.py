"""How servers take a prompt of token ids, and how they return the ids of a reply."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from typing import Any, Protocol

from tokenward.errors import UserError
from tokenward.sampling.engines import Continuation, Order, check_not_raised


class Dialect(Protocol):
    """How a server takes an order and returns token ids."""

    @property
    def path(self) -> str:
        """Path after the base address, or a whole address."""
        ...

    def body(self, order: Order, model: str) -> dict[str, Any]:
        """The request.

        Raises:
            UserError: the server cannot take a setting.
        """
        ...

    def read(self, order: Order, answer: Mapping[str, Any]) -> Continuation:
        """The answer.

        Raises:
            Odd: it is not the answer to the order.
        """
        ...


class Odd(Exception):
    """An answer that is not one to the order. The message says what the server did."""


@dataclass(frozen=True, slots=True)
class Completions:
    """The OpenAI route, with the token ids that vLLM and SGLang add on request.

    Attributes:
        joint: Whether top_k and top_p are both applied to the whole distribution, as SGLang does. transformers and vLLM apply
            top_p to what top_k leaves.
    """

    joint: bool = False
    path: str = "/completions"

    def body(self, order: Order, model: str) -> dict[str, Any]:
        """See :class:`Dialect`."""
        settings = order.settings
        check_not_raised(settings.temperature, "vLLM")
        if self.joint and settings.top_k and settings.top_p < 1:
            raise UserError(
                f"SGLang applies top_k and top_p to the same distribution, and top_k {settings.top_k} with top_p {settings.top_p:g} would be "
                "another one than in training. Set top_k: 0 or top_p: 1.0, or use vLLM.",
                code="unsupported-sampling",
            )
        # Everything that the folder's generation_config.json could set in their place is named.
        neutral = {
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "min_p": 0.0,
            "n": 1,
        }
        return {
            "model": model,
            "prompt": order.prompt,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k or -1,
            "seed": order.seed,
            "stop": list(settings.stop) or None,
            "stop_token_ids": order.ends,
            "return_token_ids": True,
            "logprobs": 1 if order.logprobs else None,
            **neutral,
        }

    def read(self, order: Order, answer: Mapping[str, Any]) -> Continuation:
        """See :class:`Dialect`."""
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise Odd("does not return one choice for a prompt")
        choice = choices[0]
        ids = choice.get("token_ids")
        if not isinstance(ids, list):
            raise Odd(
                "returns text without token ids. Text may be tokenized otherwise than it was sampled, so it is not used"
            )
        if (read := choice.get("prompt_token_ids")) is not None and read != order.prompt:
            raise Odd(
                f"read {len(read)} prompt tokens in place of the {len(order.prompt)} that it was sent, so it changes prompts"
            )
        reason = choice.get("finish_reason")
        if reason not in ("stop", "length"):
            raise Odd(f"ended a reply with finish_reason {reason!r:.80}")
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
        return Continuation(ids, reason == "stop", logprobs)


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """llama.cpp's own route: its OpenAI route returns no token ids.

    Attributes:
        path: Address of the route.
    """

    path: str

    def body(self, order: Order, model: str) -> dict[str, Any]:
        """See :class:`Dialect`."""
        settings = order.settings
        return {
            "model": model,
            "prompt": order.prompt,
            "n_predict": settings.max_new_tokens,
            "stop": list(settings.stop),
            "return_tokens": True,
            "n_probs": int(order.logprobs),
            "cache_prompt": False,  # a prompt that is read in other pieces has other rounding, so a reply would not repeat
            **self._sampling(order),
        }

    @staticmethod
    def _sampling(order: Order) -> dict[str, Any]:
        settings = order.settings
        return {
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "seed": order.seed,
            # In transformers' order, and without llama.cpp's default min_p of 0.05.
            "samplers": ["temperature", "top_k", "top_p"],
        }

    def read(self, order: Order, answer: Mapping[str, Any]) -> Continuation:
        """See :class:`Dialect`."""
        ids = answer.get("tokens")
        if not isinstance(ids, list):
            raise Odd("returns no tokens, although return_tokens is set")
        if (read := answer.get("tokens_evaluated")) != len(order.prompt):
            raise Odd(f"read {read!s:.80} prompt tokens in place of the {len(order.prompt)} that it was sent")
        if answer.get("truncated"):
            raise Odd("cut a reply off, because prompt and reply exceed its context (-c divided by -np)")
        used = answer.get("generation_settings", {})
        for name, value in self._sampling(order).items():
            if name in used and not _same(used[name], value):
                raise Odd(f"sampled with {name} {used[name]!r:.80} in place of {value!r}")
        found = answer.get("completion_probabilities")
        logprobs = None if found is None else _aligned(ids, found)
        return Continuation(ids, answer.get("stop_type") != "limit", logprobs)


_PIECES = 4
"""A character has at most this many bytes, and so tokens."""


def _aligned(ids: Sequence[int], found: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """llama.cpp's log-probability of each token, None where it is not known.

    It leaves out those of tokens that are only a part of a character, so values are known up to the first of these. That one
    is missed if a token soon after it has the same id, so with any left out, a token that soon comes again ends them too.
    """
    known = min(len(ids), len(found))
    known = next((place for place in range(known) if found[place]["id"] != ids[place]), known)
    if len(found) < len(ids):
        again = (place for place in range(known) if ids[place] in ids[place + 1 : place + 1 + _PIECES])
        known = next(again, known)
    return [float(found[place]["logprob"]) if place < known else None for place in range(len(ids))]


def _same(used: Any, value: Any) -> bool:
    """Whether a setting is the same, up to the rounding of a float32."""
    numbers = isinstance(used, int | float) and isinstance(value, int | float)
    return isclose(used, value, rel_tol=1e-6) if numbers else used == value
