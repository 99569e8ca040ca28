"""From prompts to rows: replies sampled from the policy, scored by a preference source, and ranked."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from tokenward.data.parsers import dense
from tokenward.distributed import alone, first_alone, split
from tokenward.sampling.sampler import Reply, Sampler, TransformersSampler
from tokenward.sampling.sources import call_source
from tokenward.tokens.rows import TokenRow
from tokenward.types import Comparison, Example

Progress = Callable[[int], None]

SCORED_AT_ONCE = 16
"""Contexts whose replies a source gets in one call, so that a slow source shows progress."""


class Context(NamedTuple):
    """An example and its prompt's token ids."""

    example: Example
    prompt: list[int]


class Ranked(NamedTuple):
    """Ranked groups of replies: those with an order, what was dropped by reason, and the mean score of all replies."""

    rows: list[TokenRow]
    counts: dict[str, int]
    mean: float


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that depends only on the parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSampler:
    """Samples replies and scores them by a preference source; ``name`` is the source's, for errors.

    Without a source it only samples.
    """

    sampler: Sampler
    source: Callable[..., Any] | None
    name: str

    def replies(
        self, prompts: Sequence[Sequence[int]], *, count: int, seed: int, progress: Progress | None = None
    ) -> list[list[Reply]]:
        """``count`` replies to each prompt. All processes of a launch call this with the same prompts and share the work.

        A sampler of another kind is called by the first process only, because what it does in several is not known.
        """
        settings: dict[str, Any] = {"count": count, "seed": seed, "progress": progress}
        if alone():
            return self.sampler(prompts, **settings)
        if isinstance(self.sampler, TransformersSampler):
            return replace(self.sampler, shared=True)(prompts, **settings)
        return first_alone(lambda: self.sampler(prompts, **settings))

    def draw(
        self,
        contexts: Sequence[Context],
        *,
        count: int,
        seed: int,
        drawn: Progress | None = None,
        scored: Progress | None = None,
    ) -> tuple[list[list[Reply]], list[list[float]]]:
        """``count`` replies to each context, and the score of each. All processes of a launch share the work.

        ``drawn`` is called with the number of new replies, ``scored`` with that of newly scored ones.

        Raises:
            UserError: the source cannot score a row, or returns something else than finite numbers.
        """
        prompts = [context.prompt for context in contexts]
        replies = self.replies(prompts, count=count, seed=seed, progress=drawn)

        def scores_of(start: int) -> list[list[float]]:
            group = slice(start, start + SCORED_AT_ONCE)
            return self._scores(contexts[group], replies[group])

        scores: list[list[float]] = []
        for found in split(range(0, len(contexts), SCORED_AT_ONCE), scores_of, at_once=1):
            scores += found
            if scored is not None:
                scored(sum(map(len, found)))
        return replies, scores

    def _scores(self, contexts: Sequence[Context], replies: Sequence[Sequence[Reply]]) -> list[list[float]]:
        assert self.source is not None
        flat = [
            (context.example, reply)
            for context, group in zip(contexts, replies, strict=True)
            for reply in group
        ]
        found = call_source(
            self.name,
            self.source,
            [example.prompt[-1]["content"] if example.prompt else "" for example, _ in flat],
            [reply.text for _, reply in flat],
            [reply.ids for _, reply in flat],
            columns_of([example for example, _ in flat]),
            [example.source for example, _ in flat],
        )
        values = iter(found)
        return [[next(values) for _ in group] for group in replies]

    def ranked(
        self,
        contexts: Sequence[Context],
        *,
        count: int,
        seed: int,
        drawn: Progress | None = None,
        scored: Progress | None = None,
    ) -> Ranked:
        """Groups of ``count`` ranked replies, as rows that a token reward learns from; see :meth:`draw`.

        Ranks are dense: 0 is the best, equal scores are a tie, and the next score gets the next number.
        """
        replies, scores = self.draw(contexts, count=count, seed=seed, drawn=drawn, scored=scored)
        rows: list[TokenRow] = []
        counts: Counter[str] = Counter()
        for context, group, values in zip(contexts, replies, scores, strict=True):
            ranks = dense([-value for value in values])
            if len(ranks) < 2:
                counts["dropped: one response"] += 1
            elif max(ranks) == 0:
                counts["dropped: all responses tied"] += 1
            else:
                rows.append(sampled_row(context, group, ranks=ranks, scores=values))
        flat = [value for values in scores for value in values]
        if empty := count * len(contexts) - len(flat):
            counts["dropped: empty replies"] = empty
        return Ranked(rows, dict(counts), sum(flat) / len(flat))


def sampled_row(
    context: Context,
    replies: Sequence[Reply],
    *,
    ranks: Sequence[int] | None = None,
    scores: Sequence[float] | None = None,
) -> TokenRow:
    """A context's replies as one comparison, with exactly the token ids that were sampled."""
    comparison = Comparison(
        key=context.example.key,
        prompt=context.example.prompt,
        responses=tuple(reply.text for reply in replies),
        ranks=tuple(ranks) if ranks is not None else (0,) * len(replies),
        source=context.example.source,
        scores=None if scores is None else tuple(scores),
        tools=context.example.tools,
    )
    ended = [int(reply.ended) for reply in replies]
    return TokenRow(comparison, context.prompt, [reply.ids for reply in replies], ended)


def columns_of(examples: Sequence[Example]) -> Mapping[str, list[Any]]:
    """The examples' columns as lists, and ``references`` if any example has some."""
    names = {name: None for example in examples for name in example.columns}
    columns = {name: [example.columns.get(name) for example in examples] for name in names}
    if any(example.references for example in examples):
        columns["references"] = [list(example.references) for example in examples]
    return columns


def chosen(count: int, total: int, seed: int) -> list[int]:
    """``count`` of ``total`` indices in random order, each the same number of times (plus or minus one)."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(total, generator=generator).tolist()
    return order[:count]
