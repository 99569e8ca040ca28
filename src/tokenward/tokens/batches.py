"""Batches by length within a token budget."""

from collections.abc import Iterator, Sequence

from tokenward.tokens.rows import Layout, TokenRow


def budgeted(rows: Sequence[TokenRow], *, layout: Layout, tokens: int) -> Iterator[list[int]]:
    """Indices of rows, grouped by length so that a padded group holds at most ``tokens`` tokens.

    A row that is longer than the budget stands alone: nothing is dropped. Longest first, so that
    the first group shows whether the memory suffices.
    """
    order = sorted(range(len(rows)), key=lambda index: -rows[index].tokens(layout))
    group: list[int] = []
    for index in order:
        # Sorted, the group's first row is its widest: its width is everyone's after padding.
        if group and (len(group) + 1) * rows[group[0]].tokens(layout) > tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group
