"""Sampling with an engine outside of the trainer: what is asked of it, and what is checked of its answers.

Only token ids are taken from an engine. Its log-probabilities are rounded otherwise than the trainer's, so they serve one
purpose: to tell whether it holds the same weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from numbers import Integral
from typing import NamedTuple, Protocol

import torch

from tokenward.errors import UserError
from tokenward.models.loading import LanguageModel
from tokenward.sampling.rollouts import seed_of
from tokenward.sampling.sampler import Reply, SamplingSettings, ends_of, reply_of, with_end_of_turn
from tokenward.scoring.reads import Progress, token_values
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.template import Template
from tokenward.types import Comparison

PROBES, PROBE_TOKENS = 8, 32
"""Prompts and tokens per prompt of the check of an engine's weights."""

TOLERANCE = 0.1
"""Largest mean difference of log-probabilities, in nats per token, at which an engine passes for the same weights."""

SEEDS = 2**31
"""Seeds are below this, which every engine takes. llama.cpp turns larger ones to 0 without a word."""


class Order(NamedTuple):
    """What an engine is asked for: one continuation of one prompt.

    Attributes:
        prompt: Token ids.
        settings: Sampling settings; ``max_new_tokens`` is the number of tokens that may still come.
        ends: Tokens that end the reply.
        seed: Seed of this reply alone.
        logprobs: Whether log-probabilities of the reply's tokens are wanted.
    """

    prompt: list[int]
    settings: SamplingSettings
    ends: list[int]
    seed: int
    logprobs: bool = False


class Continuation(NamedTuple):
    """What an engine answered.

    Attributes:
        ids: The new tokens, with the one that ended the reply.
        stopped: Whether the engine ended the reply before the token limit did.
        logprobs: Log-probability of each token at temperature 1, nats, if they were wanted; None where the engine does not tell.
    """

    ids: list[int]
    stopped: bool
    logprobs: Sequence[float | None] | None = None


class Engine(Protocol):
    """An open engine, which holds the weights of one model at a time."""

    @property
    def title(self) -> str:
        """What errors call it."""
        ...

    @property
    def facts(self) -> dict[str, str]:
        """What a manifest says about it."""
        ...

    def hold(self, model: LanguageModel, *, first: bool) -> None:
        """Make the engine hold these weights; ``first`` is False if it held others of the same model before.

        Raises:
            UserError: it cannot.
        """
        ...

    def draw(self, orders: Sequence[Order], progress: Progress) -> list[Continuation]:
        """A continuation for each order. ``progress`` is called with the number of new ones.

        Raises:
            UserError: the engine cannot be reached, refuses an order, or does not answer with token ids.
        """
        ...

    def close(self) -> None:
        """End the engine, or the connection to it."""
        ...


class WeightCheck(NamedTuple):
    """How far an engine's log-probabilities are from the model's, on tokens that the engine sampled at temperature 1.

    Attributes:
        tokens: Number of tokens.
        mean: Mean absolute difference, nats.
        largest: Largest absolute difference, nats.
    """

    tokens: int
    mean: float
    largest: float


@dataclass(kw_only=True)
class EngineSampler:
    """Samples replies with an engine, after a check that it holds the model's weights.

    The check is made at the first call, and again when the weights have changed.

    Attributes:
        engine: The engine.
        model: The model whose replies are wanted.
        template: Defines the end of a reply.
        settings: Sampling settings.
        tolerance: Largest mean difference of log-probabilities, nats per token.
        before: The model that ``model`` was trained from. An engine whose log-probabilities are closer to it is refused.
        checks: Results of the checks so far.
    """

    engine: Engine
    model: LanguageModel
    template: Template
    settings: SamplingSettings
    tolerance: float = TOLERANCE
    before: LanguageModel | None = None
    checks: list[WeightCheck] = field(default_factory=list)
    _mark: list[float] = field(default_factory=list)
    _probe: list[Continuation] = field(default_factory=list)

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        count: int,
        seed: int,
        progress: Progress | None = None,
    ) -> list[list[Reply]]:
        """See :class:`tokenward.sampling.Sampler`.

        Each reply has a seed of its own, which depends on ``seed`` and on its place alone.

        Raises:
            UserError: the engine holds other weights, cannot take a setting, or does not return valid token ids.
        """
        if self.template.encoder:
            raise UserError(
                f"{self.model.name} has an encoder, and {self.engine.title} takes prompts of decoders only. Sample with transformers.",
                code="unsupported-model",
            )
        if self.settings.fixed_length:
            raise UserError(
                f"replies of a fixed length need tokens without an end, which {self.engine.title} is not asked for. A prompt_task samples "
                "with transformers.",
                code="unsupported-sampling",
            )
        self.check_weights(prompts)
        settings = with_end_of_turn(self.settings, self.template)
        repeated = [list(prompt) for prompt in prompts for _ in range(count)]
        replies = self._replies(repeated, settings, seed, progress)
        return [replies[start : start + count] for start in range(0, len(replies), count)]

    def check_weights(self, prompts: Sequence[Sequence[int]]) -> None:
        """Make the engine hold the model's weights, and compare its log-probabilities with the model's.

        Raises:
            UserError: they differ by more than the tolerance, or they are those of ``before``.
        """
        mark = weights_mark(self.model)
        if mark == self._mark:
            return
        self.engine.hold(self.model, first=not self._mark)
        orders = self._probe_orders(prompts)
        drawn = self._drawn(orders)
        if drawn == self._probe:
            raise self._wrong(
                "it answers exactly as before the weights changed, so it does not hold the new ones"
            )
        found = difference_to(self.model, orders, drawn)
        if not len(found):
            raise self._invalid("no log-probabilities, without which its weights cannot be checked")
        check = WeightCheck(len(found), float(found.abs().mean()), float(found.abs().max()))
        self._check_not_before(orders, drawn, found)
        if not check.mean <= self.tolerance:
            raise self._wrong(
                f"its log-probabilities differ from the model's by {check.mean:.3g} nats per token on average (the largest difference "
                f"is {check.largest:.3g}; {check.tokens} tokens), and the tolerance is {self.tolerance:g}"
            )
        self.checks.append(check)
        self._mark, self._probe = mark, drawn

    def _check_not_before(
        self, orders: Sequence[Order], drawn: Sequence[Continuation], found: torch.Tensor
    ) -> None:
        """Refuse an engine that is closer to the model before training, however small both differences are."""
        if self.before is None:
            return
        other = difference_to(self.before, orders, drawn)
        if other.square().mean() < found.square().mean():
            raise self._wrong(
                f"its log-probabilities are closer to {self.before.name}, the model before training (off by "
                f"{float(other.abs().mean()):.3g} nats per token), than to this model (off by {float(found.abs().mean()):.3g})"
            )

    def _wrong(self, found: str) -> UserError:
        return UserError(
            f"{self.engine.title} does not hold the weights of {self.model.name}: {found}. Serve that folder in the type in which it "
            "was saved, without quantization; or raise the sampler's tolerance if the difference is rounding.",
            code="other-weights",
        )

    def _probe_orders(self, prompts: Sequence[Sequence[int]]) -> list[Order]:
        settings = SamplingSettings(max_new_tokens=min(PROBE_TOKENS, self.settings.max_new_tokens))
        distinct = list(dict.fromkeys(map(tuple, prompts)))[:PROBES]
        ends = ends_of(self.model, self.template)
        return [
            Order(list(prompt), settings, ends, _seed("weights", place), logprobs=True)
            for place, prompt in enumerate(distinct)
        ]

    def _replies(
        self,
        prompts: Sequence[list[int]],
        settings: SamplingSettings,
        seed: int,
        progress: Progress | None,
    ) -> list[Reply]:
        """Replies to the prompts, each continued until one of our own rules ends it.

        An engine may end a reply at a token that is no end here: each has its own list of them. Such a reply is not over.
        """
        ends, rows = ends_of(self.model, self.template), [[] for _ in prompts]
        done: dict[int, Reply] = {}
        while open_rows := [place for place in range(len(rows)) if place not in done]:
            orders = [
                Order(
                    [*prompts[place], *rows[place]],
                    replace(settings, max_new_tokens=settings.max_new_tokens - len(rows[place])),
                    ends,
                    _seed(seed, place, len(rows[place])),
                )
                for place in open_rows
            ]
            # Replies that are continued were counted in the first round.
            answers = self._drawn(orders, progress if len(orders) == len(rows) else None)
            for place, order, drawn in zip(open_rows, orders, answers, strict=True):
                rows[place] += drawn.ids
                reply = reply_of(self.template, rows[place], settings, ends)
                if reply.ended or len(rows[place]) == settings.max_new_tokens:
                    done[place] = reply
                elif not drawn.stopped:
                    raise self._invalid(
                        f"{len(drawn.ids)} of {order.settings.max_new_tokens} tokens without an end, as if its context were full. Start it with "
                        "a longer one"
                    )
        return [done[place] for place in range(len(rows))]

    def _drawn(self, orders: Sequence[Order], progress: Progress | None = None) -> list[Continuation]:
        """The engine's answers, each a list of known tokens of at most the length that was asked for."""
        found = self.engine.draw(orders, progress or (lambda count: None))
        if len(found) != len(orders):
            raise self._invalid(f"{len(found)} replies to {len(orders)} prompts")
        known = self.model.model.config.get_text_config().vocab_size
        for order, drawn in zip(orders, found, strict=True):
            if not drawn.ids:
                raise self._invalid("a reply without tokens, and the token that ends a reply is a part of it")
            if len(drawn.ids) > order.settings.max_new_tokens:
                raise self._invalid(
                    f"{len(drawn.ids)} tokens where at most {order.settings.max_new_tokens} were asked for"
                )
            for item in drawn.ids:
                if isinstance(item, bool) or not isinstance(item, Integral) or not 0 <= item < known:
                    raise self._invalid(
                        f"the token id {item!r:.80}, but ids of {self.model.name} are integers from 0 to {known - 1}. It holds another model"
                    )
            self._check_logprobs(drawn)
        return found

    def _check_logprobs(self, drawn: Continuation) -> None:
        if drawn.logprobs is not None and len(drawn.logprobs) != len(drawn.ids):
            raise self._invalid(f"{len(drawn.logprobs)} log-probabilities of {len(drawn.ids)} tokens")
        for value in drawn.logprobs or ():
            if value is not None and not (isinstance(value, int | float) and isfinite(value)):
                raise self._invalid(f"the log-probability {value!r:.80}, which is no finite number")

    def _invalid(self, problem: str) -> UserError:
        return UserError(f"{self.engine.title} returned {problem}.", code="wrong-replies")


COLDEST = 0.01
"""vLLM samples at this temperature in place of a lower one, with a warning in its own log."""


def check_not_raised(temperature: float, name: str) -> None:
    """Refuse a temperature that vLLM would raise without an error."""
    if 0 < temperature < COLDEST:
        raise UserError(
            f"{name} raises the temperature {temperature:g} to {COLDEST:g}. Use {COLDEST:g} or more, or top_k 1 to always take the most "
            "likely token.",
            code="unsupported-sampling",
        )


def _seed(*parts: int | str) -> int:
    return seed_of(*parts) % SEEDS


def weights_mark(model: LanguageModel) -> list[float]:
    """A sum per weight, which changes when a training step changes the weights."""
    sums = [weight.detach().sum(dtype=torch.float64) for weight in model.model.state_dict().values()]
    return torch.stack([value.cpu() for value in sums]).tolist()


def difference_to(
    model: LanguageModel, orders: Sequence[Order], drawn: Sequence[Continuation]
) -> torch.Tensor:
    """Log-probabilities of an engine minus those of a model, nats, where the engine tells them.  -> [tokens of all replies]"""
    blank = Comparison(key="", prompt=(), responses=("",), ranks=(0,), source="check of an engine's weights")
    rows = [TokenRow(blank, order.prompt, [item.ids], [0]) for order, item in zip(orders, drawn, strict=True)]
    values = token_values(model, rows, precision="float32", tokens_per_batch=8192)
    pairs = [
        (theirs, ours)
        for item, (response,) in zip(drawn, values, strict=True)
        for theirs, ours in zip(item.logprobs or [None] * len(item.ids), response.tolist(), strict=True)
        if theirs is not None
    ]
    return torch.tensor([theirs - ours for theirs, ours in pairs])
