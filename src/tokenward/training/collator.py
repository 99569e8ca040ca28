"""Rows to the passes of one training step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from tokenward.tokens.batches import Batch, budgeted, collate
from tokenward.tokens.rows import Layout, TokenRow

Prepare = Callable[[Sequence[TokenRow], int], Sequence[TokenRow]]
"""``f(rows, step) -> rows``: all rows of an optimizer step as they train, as many and in their order."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The comparisons of one device batch, cut into passes by length.

    Attributes:
        passes: Batches that go through the model one after another.
        places: Per pass, where each comparison stood in the device batch.
        sources: Per pass, where each comparison came from.
        comparisons: How many there are in all passes.
        rows: The comparisons themselves, where they are to be prepared before they are cut into passes.
        tokens: Of all comparisons, each prompt once.
    """

    passes: tuple[Batch, ...]
    places: tuple[tuple[int, ...], ...]
    sources: tuple[tuple[str, ...], ...]
    comparisons: int
    rows: tuple[TokenRow, ...] = ()
    tokens: int = 0

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
        start_id: What a decoder begins with, where the model has an encoder.
        whole: See :func:`tokenward.tokens.rows.collate`.
        tokens_per_forward: Padded tokens of a pass at most, unless one comparison alone is longer.
        defer: Leave the rows whole, for the trainer to prepare and cut when their turn comes: a loader reads
            ahead, and what depends on the weights must not be made before the step.
    """

    layout: Layout
    pad_id: int
    start_id: int | None = None
    whole: bool = True
    tokens_per_forward: int
    defer: bool = False

    def __call__(self, rows: Sequence[TokenRow]) -> StepBatch:
        """Rows as a step's batch."""
        if self.defer:
            return StepBatch((), (), (), len(rows), tuple(rows))
        return self.cut(rows)

    def cut(self, rows: Sequence[TokenRow]) -> StepBatch:
        """Cut rows into passes; the order of the comparisons inside changes, the loss does not."""
        groups = list(budgeted(rows, layout=self.layout, tokens=self.tokens_per_forward))
        passes = tuple(
            collate(
                [rows[index] for index in group],
                layout=self.layout,
                pad_id=self.pad_id,
                start_id=self.start_id,
                whole=self.whole,
            )
            for group in groups
        )
        sources = tuple(tuple(rows[index].comparison.source for index in group) for group in groups)
        tokens = sum(row.length for row in rows)
        return StepBatch(passes, tuple(map(tuple, groups)), sources, len(rows), tokens=tokens)
