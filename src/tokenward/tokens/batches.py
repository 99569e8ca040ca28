"""Batches by length within a token budget."""

from collections.abc import Iterator, Sequence

from tokenward.tokens.rows import Layout, TokenRow


def budgeted(rows: Sequence[TokenRow], *, layout: Layout, tokens: int) -> Iterator[list[int]]:
    """Indices of comparisons, grouped by length so that a padded group holds at most ``tokens`` tokens.

    A comparison that is longer than the budget stands alone: nothing is dropped. Longest first, so
    that the first group shows whether the memory suffices.
    """
    shapes = [row.shape(layout) for row in rows]
    group: list[int] = []
    height, width = 0, 0
    for index in sorted(range(len(rows)), key=lambda index: -shapes[index][1]):
        more, own_width = shapes[index]
        # Sorted, the group's first comparison is its widest: its width is everyone's after padding.
        if group and (height + more) * width > tokens:
            yield group
            group = []
        if not group:
            height, width = 0, own_width
        height += more
        group.append(index)
    if group:
        yield group
