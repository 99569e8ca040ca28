"""From prompts to sampled rows: drawn from the policy, scored by a preference source, ranked."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tokenward.sampling.sampler import Reply, Sampler
from tokenward.sampling.sources import Group, call_source, rank_groups
from tokenward.tokens.rows import TokenRow
from tokenward.types import Comparison, Example

EMPTY = "dropped: empty replies"

Progress = Callable[[int], None]

SCORED_AT_ONCE = 16
"""Contexts whose replies a source gets in one call."""


class Context(NamedTuple):
    """An example and its prompt as the policy sees it."""

    example: Example
    prompt: list[int]


class Ranked(NamedTuple):
    """Ranked groups of samples, and what was counted on the way.

    Attributes:
        rows: One per group that shows an order.
        counts: Groups dropped by reason, and empty replies.
        mean: Mean score of all samples, those of dropped groups too.
    """

    rows: list[TokenRow]
    counts: dict[str, int]
    mean: float


def seed_of(*parts: int | str) -> int:
    """A seed that depends on the parts alone, 63 bits."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredSampler:
    """Samples replies and scores them.

    Attributes:
        sampler: Draws from the policy of now.
        source: The preference source.
        name: The source's, for messages.
    """

    sampler: Sampler
    source: Callable[..., Any]
    name: str

    def draw(
        self,
        contexts: Sequence[Context],
        *,
        count: int,
        seed: int,
        drawn: Progress | None = None,
        scored: Progress | None = None,
    ) -> tuple[list[list[Reply]], list[list[float]]]:
        """``count`` replies to each context, and the score of each.

        Args:
            contexts: What to reply to.
            count: Replies to each.
            seed: Of the draws.
            drawn: Called with the number of replies drawn.
            scored: Called with the number of replies scored.

        Raises:
            UserError: the source failed for a row, or gave no finite number.
        """
        prompts = [context.prompt for context in contexts]
        replies = self.sampler(prompts, count=count, seed=seed, progress=drawn)
        scores: list[list[float]] = []
        for start in range(0, len(contexts), SCORED_AT_ONCE):
            group = slice(start, start + SCORED_AT_ONCE)
            scores += self._scores(contexts[group], replies[group])
            if scored is not None:
                scored(sum(map(len, scores[group])))
        return replies, scores

    def _scores(self, contexts: Sequence[Context], replies: Sequence[Sequence[Reply]]) -> list[list[float]]:
        flat = [(context, reply) for context, group in zip(contexts, replies, strict=True) for reply in group]
        values = iter(
            call_source(
                self.name,
                self.source,
                [_asked(context.example) for context, _ in flat],
                [reply.text for _, reply in flat],
                [reply.ids for _, reply in flat],
                columns_of([context.example for context, _ in flat]),
                [context.example.source for context, _ in flat],
            )
        )
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
        """Groups of ``count`` ranked replies, as rows that a token reward learns from; see :meth:`draw`."""
        replies, scores = self.draw(contexts, count=count, seed=seed, drawn=drawn, scored=scored)
        groups = {
            index: Group([r.ids for r in group], [r.text for r in group], [r.ended for r in group], values)
            for index, (group, values) in enumerate(zip(replies, scores, strict=True))
        }
        found = rank_groups(groups)
        rows = [
            sampled_row(contexts[item.row], replies[item.row], ranks=item.ranks, scores=item.group.scores)
            for item in found.rows
        ]
        flat = [value for values in scores for value in values]
        empty = count * len(contexts) - len(flat)
        counts = {**found.counts, **({EMPTY: empty} if empty else {})}
        return Ranked(rows, counts, sum(flat) / len(flat))


def sampled_row(
    context: Context,
    replies: Sequence[Reply],
    *,
    ranks: Sequence[int] | None = None,
    scores: Sequence[float] | None = None,
) -> TokenRow:
    """A context's replies as one comparison, with the very ids that were sampled."""
    comparison = Comparison(
        key=context.example.key,
        prompt=context.example.prompt,
        responses=tuple(reply.text for reply in replies),
        ranks=tuple(ranks) if ranks is not None else (0,) * len(replies),
        source=context.example.source,
        scores=None if scores is None else tuple(scores),
        tools=context.example.tools,
    )
    ended = [reply.ended for reply in replies]
    return TokenRow(comparison, context.prompt, [reply.ids for reply in replies], [int(end) for end in ended])


def _asked(example: Example) -> str:
    return example.prompt[-1]["content"] if example.prompt else ""


def columns_of(examples: Sequence[Example]) -> Mapping[str, list[Any]]:
    """The examples' columns, each a list over them, and ``references`` where there are any."""
    names = {name: None for example in examples for name in example.columns}
    columns = {name: [example.columns.get(name) for example in examples] for name in names}
    if any(example.references for example in examples):
        columns["references"] = [list(example.references) for example in examples]
    return columns


def chosen(count: int, total: int, seed: int) -> list[int]:
    """``count`` of ``total`` indices in a random order, each as often as any other, give or take one."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(total, generator=generator).tolist()
    return order[:count]
