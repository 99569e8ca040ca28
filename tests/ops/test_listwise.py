"""Plackett-Luce: hand-worked values, laws, the published code's cut-off, ties against all orders, random subsets."""

import math
from itertools import permutations

import pytest
import torch

from tokenward.ops.listwise import agreement, plackett_luce, random_subsets, ranks_differ

GENERATOR = torch.Generator().manual_seed(0)


def one_list(scores, ranks, **settings):
    """Loss and gradient of a single comparison."""
    values = torch.as_tensor(scores).clone().requires_grad_()
    owner = torch.zeros(len(ranks), dtype=torch.long)
    loss = plackett_luce(values, torch.tensor(ranks), owner, 1, **settings)
    loss.sum().backward()
    return loss.item(), values.grad.tolist()


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_values_by_hand():
    # log(e^2 + e^1 + e^0) - 2 = log(1 + 0.3678794 + 0.1353353) = 0.4076059;  log(e + 1) - 1 = 0.3132617
    loss, gradient = one_list(double(2.0, 1.0, 0.0), [0, 1, 2])
    assert loss == pytest.approx(0.7208676, abs=1e-7)
    # softmax(2, 1, 0) = (0.6652410, 0.2447285, 0.0900306), softmax(1, 0) = (0.7310586, 0.2689414)
    assert gradient == pytest.approx([-0.3347590, -0.0242129, 0.3589720], abs=1e-7)
    halved = one_list(double(4.0, 2.0, 0.0), [0, 1, 2], temperature=2.0)
    assert halved[0] == pytest.approx(0.7208676, abs=1e-7)
    # A tie of two: each order half the time, log(e^1 + e^0) - 1/2.
    assert one_list(double(1.0, 0.0), [0, 0])[0] == pytest.approx(1.3132617 - 0.5, abs=1e-7)


@pytest.mark.parametrize("gap", [-1e4, -30.0, -1.0, 0.0, 0.3, 30.0, 1e4])
def test_two_responses_are_bradley_terry(gap):
    loss, gradient = one_list(double(gap, 0.0), [0, 1])
    assert loss == pytest.approx(-torch.nn.functional.logsigmoid(double(gap)).item(), rel=1e-14, abs=0)
    right = torch.sigmoid(double(-gap)).item()
    assert gradient == pytest.approx([-right, right], rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_likelihoods_of_all_orders_sum_to_one(size):
    scores = 3 * torch.randn(size, generator=GENERATOR, dtype=torch.float64)
    orders = torch.tensor(list(permutations(range(size))))
    comparison = torch.arange(len(orders)).repeat_interleave(size)
    loss = plackett_luce(scores.repeat(len(orders)), orders.flatten(), comparison, len(orders))
    assert (-loss).exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    expected = pytest.approx(math.log(math.factorial(size)), rel=1e-6)
    assert one_list(torch.full((size,), 475.7), list(range(size)))[0] == expected
    assert one_list(torch.full((size,), 475.7), [0] * size)[0] == expected


@pytest.mark.parametrize("ranks", [[2, 0, 1, 3], [1, 0, 1, 2]])
def test_order_and_shift_change_nothing(ranks):
    scores = double(0.5, -1.0, 2.0, 0.0)
    loss, gradient = one_list(scores, ranks)
    for order in permutations(range(4)):
        other, moved = one_list(scores[list(order)], [ranks[place] for place in order])
        assert other == pytest.approx(loss, abs=1e-14)
        assert moved == pytest.approx([gradient[place] for place in order], abs=1e-14)
    other, moved = one_list(scores + 300.0, ranks)
    assert other == pytest.approx(loss, abs=1e-12)
    assert moved == pytest.approx(gradient, abs=1e-12)


def test_ranking_in_a_far_tail_is_exact():
    """tlm.md B1: the published code gives 63.9 and (2, -1, -1) for the first, (2, -1, -1) for the second."""
    loss, gradient = one_list(torch.tensor([0.0, -50.0, -60.0]), [0, 1, 2])
    assert loss == pytest.approx(4.5398899e-5, rel=1e-5)  # log(1 + e^-10)
    assert gradient == pytest.approx([0.0, -4.5397869e-5, 4.5397869e-5], rel=1e-4, abs=1e-20)
    loss, gradient = one_list(torch.tensor([60.0, 0.0, 1.0]), [0, 1, 2])
    assert loss == pytest.approx(1.3132617, abs=1e-6)
    assert gradient == pytest.approx([0.0, -0.7310586, 0.7310586], abs=1e-6)
    # Float32 and gaps of ten thousand; upside down 2e4 for the first place and 1e4 for the second.
    assert one_list(torch.tensor([1e4, 0.0, -1e4]), [0, 1, 2]) == (0.0, [0.0, 0.0, 0.0])
    assert one_list(torch.tensor([-1e4, 0.0, 1e4]), [0, 1, 2]) == (3e4, [-1.0, -1.0, 2.0])
    near, far = one_list(double(0, 0.5), [0, 0]), one_list(torch.tensor([1e4, 0, 0.5, -1e4]), [0, 1, 1, 2])
    assert far[0] == pytest.approx(near[0], rel=1e-6)
    assert far[1] == pytest.approx([0.0, *near[1], 0.0], abs=1e-6)


def test_groups_of_unequal_size_are_independent():
    sizes, ranks = [3, 1, 5, 2], [1, 0, 2, 0, 3, 1, 1, 1, 0, 0, 1]
    scores = torch.randn(11, generator=GENERATOR, dtype=torch.float64)
    scores[3] = math.nan  # the only response of group 1
    owner = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    together = plackett_luce(scores, torch.tensor(ranks), owner, 4).tolist()
    for number in (0, 2, 3):
        part = slice(sum(sizes[:number]), sum(sizes[: number + 1]))
        assert together[number] == pytest.approx(one_list(scores[part], ranks[part])[0], abs=1e-14)


@pytest.mark.parametrize("ranks", [[0, 0, 0], [0, 1, 1], [0, 0, 1], [1, 0, 0, 1, 0, 2], [1, 0, 1, 2, 1]])
def test_averaged_ties_are_the_mean_over_all_tie_breaks(ranks):
    scores = 2 * torch.randn(len(ranks), generator=GENERATOR, dtype=torch.float64)
    loss, gradient = one_list(scores, ranks)
    orders = permutations(range(len(ranks)))
    broken = [one_list(scores, ranks, tie_break=torch.tensor(order)) for order in orders]
    assert loss == pytest.approx(sum(value for value, _ in broken) / len(broken), abs=1e-12)
    mean = torch.tensor([part for _, part in broken], dtype=torch.float64).mean(0)
    assert gradient == pytest.approx(mean.tolist(), abs=1e-12)


def test_tie_break_orders_only_the_tied():
    scores = double(0.3, 1.2, -0.4, 2.0)
    ordered = one_list(scores, [0, 2, 1, 3])
    assert one_list(scores, [0, 1, 1, 2], tie_break=double(0.9, 0.7, 0.2, 0.0)) == ordered
    assert one_list(scores, [0, 2, 1, 3], tie_break=double(0.9, 0.1, 0.2, 0.0)) == ordered


def test_largest_tie():
    scores = torch.linspace(-1, 1, 13, dtype=torch.float64)
    assert one_list(torch.zeros(12), [0] * 12)[0] == pytest.approx(math.log(math.factorial(12)), rel=1e-6)
    with pytest.raises(ValueError, match="a tie of 13; the orders of at most 12"):
        one_list(scores, [0] * 13)
    expected = one_list(scores.flip(0), list(range(13)))[0]
    assert one_list(scores, [0] * 13, tie_break=-scores)[0] == pytest.approx(expected)


@pytest.mark.parametrize("tie_break", [None, double(0.1, 0.5, 0.2, 0.9, 0.3, 0.4)])
def test_gradients_match_finite_differences(tie_break):
    rank, owner = torch.tensor([0, 1, 1, 0, 0, 2]), torch.tensor([0, 0, 0, 1, 1, 1])
    scores = double(0.3, -1.0, 0.8, 2.0, 1.5, 1.9).requires_grad_()
    assert torch.autograd.gradcheck(lambda e: plackett_luce(e, rank, owner, 2, tie_break=tie_break), scores)


def test_agreement_by_hand():
    scores = double(3.0, 1.0, 2.0, 5.0, 5.0, 1.0, 2.0, 3.0)
    rank, owner = torch.tensor([0, 1, 2, 0, 1, 0, 0, 0]), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    found = agreement(scores, rank, owner, 3)
    # One of three pairs is wrong; equal scores count as wrong; the last group has no pair.
    assert found.accuracy.tolist() == pytest.approx([2 / 3, 0.0, math.nan], nan_ok=True)
    assert found.top.tolist() == [1.0, 0.0, 1.0]
    assert found.spread.tolist() == pytest.approx([math.sqrt(2 / 3), 0.0, math.sqrt(2 / 3)])
    assert ranks_differ(rank, owner, 3).tolist() == [True, True, False]
    # With tied ranks, the best of which is not 0: 1>3 no, 1>2 no, 4>3, 4>2, 3>2 yes.
    tied = agreement(double(1, 4, 3, 2), torch.tensor([1, 1, 2, 3]), torch.zeros(4, dtype=torch.long), 1)
    assert (tied.accuracy.tolist(), tied.top.tolist()) == ([0.6], [1.0])


def test_random_subsets():
    noise = torch.tensor([[0.5, 0.1, 0.3, 0.9, 0.2], [0.1, 0.4, 0.8, 0.0, 0.6]])
    drawn = random_subsets(noise, torch.tensor([0, 0, 0, 1, 1]), 2, 2)
    found = sorted(zip(drawn.subset.tolist(), drawn.response.tolist(), strict=True))
    assert found == [(0, 1), (0, 2), (1, 3), (1, 4), (2, 0), (2, 1), (3, 3), (3, 4)]
    small = random_subsets(torch.rand(3, 2, generator=GENERATOR), torch.zeros(2, dtype=torch.long), 1, 5)
    assert sorted(small.subset.tolist()) == [0, 0, 1, 1, 2, 2], "all of a smaller comparison"
    drawn = random_subsets(torch.rand(6000, 4, generator=GENERATOR), torch.zeros(4, dtype=torch.long), 1, 2)
    pairs = torch.zeros(6000, 4).index_put((drawn.subset, drawn.response), torch.tensor(1.0))
    assert pairs.sum(1).unique().tolist() == [2.0]
    _, counts = pairs.unique(dim=0, return_counts=True)
    assert len(counts) == 6
    assert (counts - 1000).abs().max() < 120, "every subset is equally likely"
