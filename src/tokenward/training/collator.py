"""Rows to the passes of one training step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from tokenward.tokens.batches import budgeted
from tokenward.tokens.rows import Layout, TokenBatch, TokenRow, collate

Weigh = Callable[[Sequence[TokenRow]], Sequence[TokenRow]]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The comparisons of one device batch, cut into passes by length.

    Attributes:
        passes: Batches that go through the model one after another.
        places: Per pass, where each comparison stood in the device batch.
        sources: Per pass, where each comparison came from.
        comparisons: How many there are in all passes.
    """

    passes: tuple[TokenBatch, ...]
    places: tuple[tuple[int, ...], ...]
    sources: tuple[tuple[str, ...], ...]
    comparisons: int

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "StepBatch":
        """The same passes on another device."""
        moved = tuple(item.to(device, non_blocking=non_blocking) for item in self.passes)
        return replace(self, passes=moved)


@dataclass(frozen=True, slots=True, kw_only=True)
class Collator:
    """Makes a :class:`StepBatch` of rows.

    Attributes:
        layout: Of the rows.
        pad_id: Fills rows.
        tokens_per_forward: Padded tokens of a pass at most, unless one comparison alone is longer.
        weigh: Gives the rows their weights where those depend on the batch.
    """

    layout: Layout
    pad_id: int
    tokens_per_forward: int
    weigh: Weigh | None = None

    def __call__(self, rows: Sequence[TokenRow]) -> StepBatch:
        """Cut rows into passes; the order of the comparisons inside changes, the loss does not."""
        # Held-out rows have no scores: they are judged by every token.
        if self.weigh is not None and all(row.scores is not None for row in rows):
            rows = self.weigh(rows)
        groups = list(budgeted(rows, layout=self.layout, tokens=self.tokens_per_forward))
        passes = tuple(
            collate([rows[index] for index in group], layout=self.layout, pad_id=self.pad_id)
            for group in groups
        )
        sources = tuple(tuple(rows[index].encoded.comparison.source for index in group) for group in groups)
        return StepBatch(passes, tuple(map(tuple, groups)), sources, len(rows))
