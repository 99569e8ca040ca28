"""Batches within a token budget."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokens.rows import encoded
from tokenward.tokens.batches import budgeted, collate
from tokenward.tokens.rows import TokenRow

lengths = st.integers(1, 12)
comparisons = st.lists(st.tuples(lengths, st.lists(lengths, min_size=2, max_size=4)), max_size=12)


def made(shapes) -> list[TokenRow]:
    return [encoded([1] * prompt, *([2] * n for n in sizes)) for prompt, sizes in shapes]


@pytest.mark.parametrize("layout", ["shared", "separate"])
@given(comparisons, st.integers(1, 120))
@settings(derandomize=True, deadline=None, max_examples=50)
def test_every_row_once_and_the_padded_batch_within_the_budget(layout, shapes, budget):
    rows = made(shapes)
    groups = list(budgeted(rows, layout=layout, tokens=budget))
    assert sorted(index for group in groups for index in group) == list(range(len(rows)))
    for group in groups:
        size = collate([rows[index] for index in group], layout=layout, pad_id=0).inputs.input_ids.numel()
        assert size <= budget or len(group) == 1


def test_batches_by_hand():
    # Shared lengths 6, 3, 4, 3:  6 alone (6 + 4 > 9), then 4 + 3 (7 + 3 > 9), then 3.
    rows = made([(2, [2, 2]), (1, [1, 1]), (2, [1, 1]), (1, [1, 1])])
    assert list(budgeted(rows, layout="shared", tokens=9)) == [[0], [2, 1], [3]]
    # Separate rows are 2 x 4, 2 x 2, 2 x 3, 2 x 2:  8, then 4 x 3 = 12 > 9, so 6, then 4 x 2 = 8.
    assert list(budgeted(rows, layout="separate", tokens=9)) == [[0], [2], [1, 3]]


def test_the_longest_comes_first():
    groups = list(budgeted(made([(1, [1, 1]), (9, [3, 2]), (4, [1, 1])]), layout="shared", tokens=5))
    assert groups == [[1], [2], [0]]
