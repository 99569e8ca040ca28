"""Batches by length within a token budget."""

from collections.abc import Iterator, Sequence

from tokenward.tokens.layouts import Layout
from tokenward.tokens.rows import TokenRow


def budgeted(rows: Sequence[TokenRow], *, layout: Layout, tokens: int) -> Iterator[list[int]]:
    """Indices of comparisons, grouped by length so that a group holds at most ``tokens`` tokens, padding included.

    A comparison that is longer than the budget stands alone: nothing is dropped. Longest first, so
    that the first group shows whether the memory suffices.
    """
    shapes = [row.shape(layout) for row in rows]
    group: list[int] = []
    taken, width = 0, 0
    for index in sorted(range(len(rows)), key=lambda index: -shapes[index][1]):
        height, own_width = shapes[index]
        # Sorted, the group's first comparison is its widest: padded, its width is everyone's.
        if not group or layout == "shared":
            width = own_width
        if group and taken + height * width > tokens:
            yield group
            group, taken, width = [], 0, own_width
        taken += height * width
        group.append(index)
    if group:
        yield group
