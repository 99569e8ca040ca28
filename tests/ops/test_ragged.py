"""Reductions over ragged tokens against plain Python loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenward.ops.ragged import position_in_group, segment_sum, weighted_mean, weighted_sum

owned = st.lists(st.tuples(st.integers(-64, 64), st.integers(0, 3), st.integers(0, 4)), max_size=30)
exactly = settings(derandomize=True, deadline=None, max_examples=50)


def test_sums_and_means_by_hand():
    # Owner 0: 1 + 4, owner 1: nothing, owner 2: 2 - 3.
    values, owner = torch.tensor([1.0, 2.0, -3.0, 4.0]), torch.tensor([0, 2, 2, 0])
    assert segment_sum(values, owner, 4).tolist() == [5.0, 0.0, -1.0, 0.0]
    assert segment_sum(values.double(), owner, 4).dtype == torch.float64
    values, owner, weights = (
        torch.tensor([2.0, 4.0, 8.0]),
        torch.tensor([0, 0, 1]),
        torch.tensor([1.0, 3.0, 0.5]),
    )
    # 1 x 2 + 3 x 4 = 14, over 1 + 3;  0.5 x 8 = 4, over 0.5; nothing.
    assert weighted_sum(values, weights, owner, 2).tolist() == [14.0, 4.0]
    assert weighted_mean(values, weights, owner, 3).tolist() == pytest.approx(
        [3.5, 8.0, math.nan], nan_ok=True
    )


@given(owned)
@exactly
def test_weighted_sum_is_the_loop(tokens):
    # Integers and quarters sum exactly in any order.
    expected = [0.0] * 4
    for value, owner, weight in tokens:
        expected[owner] += value * weight / 4
    values, owner, weight = (torch.tensor([token[i] for token in tokens]).long() for i in range(3))
    assert weighted_sum(values.float(), weight.float() / 4, owner, 4).tolist() == expected


@given(owned)
@exactly
def test_weight_zero_is_deletion(tokens):
    values, owner, weight = (torch.tensor([token[i] for token in tokens]).long() for i in range(3))
    values, weights, kept = values.float(), weight.float(), weight != 0
    broken = torch.where(kept, values, torch.nan)
    deleted = weighted_sum(values[kept], weights[kept], owner[kept], 4)
    assert weighted_sum(broken, weights, owner, 4).tolist() == deleted.tolist()


def test_non_finite_value_without_weight_has_no_gradient():
    values = torch.tensor([1.0, -torch.inf, torch.nan, torch.inf, 2.0], requires_grad=True)
    weights = torch.tensor([2.0, 0.0, 0.0, -0.0, 3.0])
    total = weighted_sum(values, weights, torch.tensor([0, 0, 0, 1, 1]), 2)
    total.sum().backward()
    assert total.tolist() == [2.0, 6.0]
    assert values.grad.tolist() == [2.0, 0.0, 0.0, 0.0, 3.0]


def test_gradients_match_finite_differences():
    values = torch.tensor([0.3, -1.2, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 0.25, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    owner = torch.tensor([1, 0, 1, 0])
    assert torch.autograd.gradcheck(lambda v, w: weighted_mean(v, w, owner, 2), (values, weights))


@given(st.lists(st.integers(0, 5), max_size=40))
@exactly
def test_position_in_group_is_the_loop(groups):
    seen: dict[int, int] = {}
    expected = []
    for group in groups:
        expected.append(seen.get(group, 0))
        seen[group] = expected[-1] + 1
    assert position_in_group(torch.tensor(groups).long()).tolist() == expected
