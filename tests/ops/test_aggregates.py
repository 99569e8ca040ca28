"""Aggregates of token rewards: hand-worked values, dependence on length, limits, gradients and removed tokens."""

import math

import pytest
import torch

from tokenward.ops.aggregates import AGGREGATES, group_mean_length, pooled, soft_max, soft_min
from tokenward.ops.ragged import segment_logsumexp, segment_sum

NEUTRAL = {
    "soft_max_mean": lambda *given: soft_max(*given, mean=True),
    "soft_min_mean": lambda *given: soft_min(*given, mean=True),
}
EVERY = pytest.mark.parametrize("function", [*AGGREGATES.values(), *NEUTRAL.values()], ids=[*AGGREGATES, *NEUTRAL])  # fmt: skip
average, total = AGGREGATES["average"], AGGREGATES["sum"]


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


REWARDS = double(1.0, 3.0, 2.0, 5.0, 5.0)
OWNER = torch.tensor([0, 0, 1, 1, 1])
ONES = torch.ones(5, dtype=torch.float64)
GIVEN = (REWARDS, ONES, OWNER, 2)


def test_values_by_hand():
    assert average(*GIVEN).tolist() == [2.0, 4.0]
    assert total(*GIVEN).tolist() == [4.0, 12.0]
    # 2 log(e^0.5 + e^1.5) = 2 x (1.5 + log 1.3678794) = 3.6265234;  2 log(e^1 + 2 e^2.5) = 2 x (2.5 + log 2.2231302)
    assert soft_max(*GIVEN).tolist() == pytest.approx([3.6265234, 6.5978324], abs=1e-7)
    # -2 log(e^-0.5 + e^-1.5) = 1 - 2 log 1.3678794;  -2 log(e^-1 + 2 e^-2.5) = 2 - 2 log 1.4462603
    assert soft_min(*GIVEN).tolist() == pytest.approx([0.3734766, 1.2620377], abs=1e-7)
    # The length-neutral forms differ by 2 log 2 = 1.3862944 and 2 log 3 = 2.1972246.
    assert soft_max(*GIVEN, mean=True).tolist() == pytest.approx([2.2402290, 4.4006078], abs=1e-7)
    assert soft_min(*GIVEN, mean=True).tolist() == pytest.approx([1.7597710, 3.4592623], abs=1e-7)


def test_group_mean_length_makes_average_the_sum_for_equal_lengths():
    lengths, comparison = double(2.0, 4.0, 9.0, 1.0, 2.0), torch.tensor([0, 0, 0, 1, 1])
    assert group_mean_length(lengths, comparison, 2).tolist() == [5.0, 5.0, 5.0, 1.5, 1.5]
    given = double(0.3, 1.0, 0.25, 2.0, 0.5, 0.125), torch.ones(6), torch.arange(2).repeat_interleave(3), 2
    scale = group_mean_length(segment_sum(*given[1:]), torch.zeros(2, dtype=torch.long), 1)
    torch.testing.assert_close(scale * average(*given), total(*given), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("length", "expected"), [(5, 3.77), (20, 6.54), (60, 8.74), (128, 10.25)])
def test_equal_rewards_show_the_length_term(length, expected):
    """tlm.md 1.3: with r = 0.55 and beta = 2 the length term dominates."""
    given = (
        torch.full((length,), 0.55, dtype=torch.float64),
        torch.ones(length),
        torch.zeros(length).long(),
        1,
    )
    term = 2.0 * math.log(length)
    assert soft_max(*given).item() == pytest.approx(expected, abs=0.005)
    assert soft_max(*given).item() == pytest.approx(0.55 + term, abs=1e-12)
    assert soft_min(*given).item() == pytest.approx(0.55 - term, abs=1e-12)
    for neutral in (average, *NEUTRAL.values()):
        assert neutral(*given).item() == pytest.approx(0.55, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.01, 0.5, 2.0, 100.0])
def test_soft_extremes_stay_within_their_bounds(temperature):
    slack = temperature * torch.tensor([2.0, 3.0]).log() + 1e-9
    highest, lowest = double(3.0, 5.0), double(1.0, 2.0)
    up, down = (function(*GIVEN, temperature=temperature) for function in (soft_max, soft_min))
    neutral = soft_max(*GIVEN, temperature=temperature, mean=True)
    for smaller, larger in (
        (highest, up), (up, highest + slack), (lowest - slack, down), (down, lowest),
        (average(*GIVEN) - 1e-12, neutral), (neutral, highest),
    ):  # fmt: skip
        assert (smaller <= larger).all()


def test_limits():
    # The maximum 5 occurs twice, so 1e-4 log 2 remains.
    assert soft_max(*GIVEN, temperature=1e-4).tolist() == pytest.approx([3, 5 + 1e-4 * math.log(2)], abs=1e-9)
    assert soft_min(*GIVEN, temperature=1e-4).tolist() == pytest.approx([1.0, 2.0], abs=1e-9)
    values, owner = torch.tensor([1e4, 0.0, -1e4, -1e4]), torch.tensor([0, 0, 1, 1])
    far = segment_logsumexp(values, torch.ones(4), owner, 2)
    assert far.tolist() == pytest.approx([1e4, -1e4 + math.log(2)]), "neither overflow nor underflow"


@EVERY
def test_gradients_match_finite_differences(function):
    weights, values = double(1.0, 0.5, 2.0, 0.0, 1.0), REWARDS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda rewards: function(rewards, weights, OWNER, 2), values)


@EVERY
@pytest.mark.parametrize("broken", [1e30, -math.inf, math.nan])
def test_weight_zero_removes_the_token(function, broken):
    short = REWARDS.clone().requires_grad_()
    expected = function(short, ONES, OWNER, 2)
    values = double(1.0, broken, 3.0, 2.0, 5.0, broken, 5.0, broken).requires_grad_()
    weights = double(1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0)
    found = function(values, weights, torch.tensor([0, 0, 0, 1, 1, 1, 1, 1]), 2)
    expected.sum().backward()
    found.sum().backward()
    assert found.tolist() == expected.tolist()
    assert values.grad[[0, 2, 3, 4, 6]].tolist() == short.grad.tolist()
    assert values.grad[[1, 5, 7]].tolist() == [0.0] * 3


@EVERY
def test_response_without_weight_does_not_affect_others(function):
    values = REWARDS.clone().requires_grad_()
    found = function(values, double(0.0, 0.0, 1.0, 1.0, 1.0), OWNER, 2)
    found[1].backward()
    assert found[1] == function(REWARDS[2:], ONES[2:], torch.zeros(3, dtype=torch.long), 1)[0]
    assert values.grad[:2].tolist() == [0.0, 0.0]
    assert values.grad.isfinite().all()


@EVERY
def test_weight_two_counts_the_token_twice(function):
    twice = function(double(1.0, 3.0, 3.0), torch.ones(3), torch.zeros(3, dtype=torch.long), 1)
    once = function(double(1.0, 3.0), double(1.0, 2.0), torch.zeros(2, dtype=torch.long), 1)
    torch.testing.assert_close(once, twice, rtol=0, atol=1e-14)


def test_pooled_segments():
    values = double(1.0, 3.0, 2.0, math.nan, 8.0, math.inf).requires_grad_()
    weights = double(1.0, 1.0, 1.0, 0.0, 2.0, 0.0)
    found = pooled(values, weights, torch.tensor([0, 0, 1, 2, 2, 3]), torch.tensor([0, 0, 0, 1, 1, 1]), 4)
    # Segment 2 keeps its second token, segment 3 none.
    assert [part.tolist() for part in found] == [[2.0, 2.0, 8.0, 0.0], [1.0, 1.0, 2.0, 0.0], [0, 0, 1, 1]]
    found[0].sum().backward()
    assert values.grad.tolist() == [0.5, 0.5, 1.0, 0.0, 1.0, 0.0]
    single = pooled(REWARDS, ONES, torch.arange(5), OWNER, 5)
    assert [part.tolist() for part in single] == [REWARDS.tolist(), ONES.tolist(), OWNER.tolist()]
