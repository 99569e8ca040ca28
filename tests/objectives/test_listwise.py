"""The reward model's loss: by hand, law 4, what shifts and lengths do, segments, ties, random lists."""

import math
from itertools import permutations

import pytest
import torch

from tests.objectives.tools import double, flat_batch
from tokenward.errors import UserError
from tokenward.objectives import PlackettLuce

KINDS = [
    PlackettLuce(),
    PlackettLuce(aggregate="sum"),
    PlackettLuce(aggregate="softmax"),
    PlackettLuce(aggregate="softmin"),
    PlackettLuce(aggregate="softmax", length_neutral=True, temperature=0.5),
    PlackettLuce(scale_by_length=False, list_temperature=3.0),
]
EVERY = pytest.mark.parametrize("objective", KINDS, ids=repr)


def batch_of(*comparisons, **values):
    """Comparisons as (lengths, ranks)."""
    lengths, ranks = zip(*comparisons, strict=True)
    return flat_batch(*lengths, ranks=list(ranks), **values)


TWO = batch_of(((2, 3, 1), (1, 0, 2)), ((1, 2), (0, 1)))
REWARDS = (0.5, 1.0, 0.25, 0.5, 1.5, 0.125, 2.0, 0.25, 1.0)


def test_by_hand():
    # Means 0.75, 0.75, 0.125 with C = 2 give e = 1.5, 1.5, 0.25. Order: second, first, third.
    # log(2 + e^-1.25) = 0.8270244;  log(1 + e^-1.25) = 0.2519291.  Then e = 1.5 (2, 0.625): -log sigma(2.0625)
    losses = PlackettLuce()(double(*REWARDS), TWO)
    expected = [math.log(2 + math.exp(-1.25)) + math.log1p(math.exp(-1.25)), math.log1p(math.exp(-2.0625))]
    assert losses.loss.tolist() == pytest.approx(expected, abs=1e-12)
    assert losses.loss.tolist() == pytest.approx([1.0789534, 0.1196797], abs=1e-6)
    # Equal scores are not right: 2 of 3 pairs. Spread of (1.5, 1.5, 0.25) and of (3, 0.9375).
    assert losses.metrics["rank/accuracy"].tolist() == pytest.approx([2 / 3, 1.0])
    assert losses.metrics["rank/top1"].tolist() == [0.0, 1.0]
    assert losses.metrics["rank/spread"].tolist() == pytest.approx([0.5892557, 1.03125])


@pytest.mark.parametrize(
    ("objective", "difference"),
    [
        (PlackettLuce(aggregate="sum"), 3.0 - 0.5),
        (PlackettLuce(aggregate="softmax"), 1.5 * (3.0 - (0.5 + 2 * math.log(2)))),
        (PlackettLuce(aggregate="softmin"), 1.5 * (3.0 - (0.5 - 2 * math.log(2)) - 2 * math.log(1))),
        (PlackettLuce(aggregate="softmax", length_neutral=True), 1.5 * (3.0 - 0.5)),
        (PlackettLuce(aggregate="softmin", scale_by_length=False, temperature=1.0), 2.5 + math.log(2)),
        (PlackettLuce(list_temperature=2.0, scale_by_length=False), 1.25),
    ],
)
def test_every_setting_by_hand(objective, difference):
    # Rewards 3 | 0.25, 0.25 for the sum, 3 | 0.5, 0.5 for the others; C = 1.5.
    low = 0.25 if objective.aggregate == "sum" else 0.5
    loss = objective(double(3.0, low, low), batch_of(((1, 2), (0, 1)))).loss.item()
    assert loss == pytest.approx(math.log1p(math.exp(-difference)), abs=1e-12)


@EVERY
def test_the_likelihoods_of_all_orders_sum_to_one(objective):
    loss = [
        objective(double(*REWARDS[:6]), batch_of(((2, 3, 1), order))).loss for order in permutations(range(3))
    ]
    assert (-torch.cat(loss)).exp().sum().item() == pytest.approx(1.0, abs=1e-12)


@EVERY
def test_law_1_in_segments(objective):
    """One segment loses a token of weight 0, another all of its tokens."""
    weights, kept = [1.0, 0.0, 0.5, 0.0, 2.0, 1.0, 0.0], [0, 2, 4, 5]
    rewards = double(1.0, math.nan, 0.5, math.nan, 2.0, 1.5, math.nan)
    short = double(1.0, 0.5, 2.0, 1.5)
    losses = objective(rewards, batch_of(((4, 3), (0, 1)), weights=weights, segments=[0, 0, 1, 2, 0, 0, 0]))
    deleted = batch_of(((2, 2), (0, 1)), weights=[weights[i] for i in kept], segments=[0, 1, 0, 0])
    expected = objective(short, deleted)
    losses.loss.sum().backward()
    expected.loss.sum().backward()
    assert losses.loss.tolist() == expected.loss.tolist()
    assert rewards.grad[kept].tolist() == short.grad.tolist()
    assert rewards.grad[[1, 3, 6]].tolist() == [0.0] * 3


@EVERY
def test_gradients_are_those_of_finite_differences(objective):
    batch = batch_of(((2, 3, 1), (1, 0, 1)), ((1, 2), (0, 1)), segments=[0, 0, 0, 1, 1, 0, 0, 0, 1])
    assert torch.autograd.gradcheck(lambda rewards: objective(rewards, batch).loss, double(*REWARDS))


@EVERY
def test_a_constant_added_to_every_reward_matters_to_the_sum_only(objective):
    plain = objective(double(*REWARDS), TWO).loss
    moved = objective(double(*(reward + 0.7 for reward in REWARDS)), TWO).loss
    if objective.aggregate == "sum":
        assert (moved - plain).abs().min() > 0.1
    else:
        torch.testing.assert_close(moved, plain, rtol=0, atol=1e-12)


def test_equal_lengths_make_the_sum_the_average():
    batch = batch_of(((3, 3, 3), (2, 0, 1)))
    average = PlackettLuce()(double(*REWARDS), batch).loss.item()
    assert PlackettLuce(aggregate="sum")(double(*REWARDS), batch).loss.item() == pytest.approx(
        average, abs=1e-14
    )


@pytest.mark.parametrize(("aggregate", "favoured"), [("softmax", 2), ("softmin", 0)])
def test_soft_extremes_prefer_a_length_and_neutral_ones_do_not(aggregate, favoured):
    """tlm.md 1.3: at the first step, r = 0.55 everywhere, lengths 40, 60 and 80."""
    batch = batch_of(((40, 60, 80), tuple(range(3)) if favoured == 0 else (2, 1, 0)))
    rewards = torch.full((180,), 0.549, dtype=torch.float64)
    losses = PlackettLuce(aggregate=aggregate)(rewards, batch)
    assert losses.metrics["rank/accuracy"].tolist() == [1.0]
    assert losses.metrics["rank/spread"].item() == pytest.approx(34.0, abs=0.5)
    neutral = PlackettLuce(aggregate=aggregate, length_neutral=True)(rewards, batch)
    assert neutral.loss.item() == pytest.approx(math.log(6), abs=1e-10)


def test_segments_are_aggregated_instead_of_tokens():
    # Words (1, 3), (8) against (1), (1): means 2 and 8, average 5, against 1; both have 2 segments, so C = 2.
    batch = batch_of(((3, 2), (0, 1)), segments=[0, 0, 1, 4, 6])
    loss = PlackettLuce()(double(1.0, 3.0, 8.0, 1.0, 1.0), batch).loss.item()
    assert loss == pytest.approx(math.log1p(math.exp(-2 * 4)), abs=1e-12)


def half_maximum(rewards, weights, owner, count):
    values = rewards.new_full((count,), -torch.inf)
    return 0.5 * values.scatter_reduce(0, owner, torch.where(weights != 0, rewards, -torch.inf), "amax")


def test_a_custom_aggregate(monkeypatch):
    monkeypatch.setattr("tokenward.ops.aggregates.half_maximum", half_maximum, raising=False)
    monkeypatch.setattr("tokenward.ops.aggregates.as_is", lambda r, w, o, c: r, raising=False)
    batch = batch_of(((1, 2), (0, 1)))
    objective = PlackettLuce(aggregate="tokenward.ops.aggregates:half_maximum")
    loss = objective(double(3.0, 1.0, 2.0), batch).loss.item()
    assert loss == pytest.approx(math.log1p(math.exp(-0.5)), abs=1e-12)
    with pytest.raises(UserError, match="as_is") as caught:
        PlackettLuce(aggregate="tokenward.ops.aggregates:as_is")(double(3.0, 1.0, 2.0), batch)
    assert caught.value.code == "wrong-result"


def test_random_ties_average_to_averaged_ties():
    batch = batch_of(((1, 1, 1), (0, 1, 1)))
    averaged = PlackettLuce()(double(0.5, 2.0, -1.0), batch).loss.item()
    torch.manual_seed(3)
    drawn = [PlackettLuce(ties="random")(double(0.5, 2.0, -1.0), batch).loss.item() for _ in range(400)]
    assert len({round(loss, 9) for loss in drawn}) == 2
    # The two orders differ by 3: the standard error of 400 draws is 0.075.
    assert sum(drawn) / 400 == pytest.approx(averaged, abs=0.2)


def test_random_lists_are_the_mean_over_all_lists_of_their_size():
    # Lists of two out of (1 token, rank 0), (2 tokens, rank 1), (1 token, rank 2); C is that of each list.
    batch, rewards = batch_of(((1, 2, 1), (0, 1, 2))), (0.5, 1.0, 0.25, -0.5)
    means = (0.5, 0.625, -0.5)
    pairs = {(0, 1): 1.5, (0, 2): 1.0, (1, 2): 1.5}
    expected = sum(math.log1p(math.exp(-c * (means[i] - means[j]))) for (i, j), c in pairs.items()) / 3
    torch.manual_seed(0)
    loss = PlackettLuce(group_size=2, groups=20_000)(double(*rewards), batch).loss.item()
    assert loss == pytest.approx(expected, abs=0.005)
    # As large as the comparison, or larger: the whole list.
    whole = PlackettLuce()(double(*rewards), batch).loss.item()
    for size in (3, 9):
        loss = PlackettLuce(group_size=size, groups=2)(double(*rewards), batch).loss.item()
        assert loss == pytest.approx(whole, abs=1e-14)


def test_lists_of_one_rank_are_not_counted():
    batch = batch_of(((1, 1, 1), (0, 0, 1)), ((1, 1), (0, 0)), ((1, 1), (0, 1)))
    rewards = double(2.0, 2.0, 0.5, 7.0, -3.0, 1.0, 0.0)
    torch.manual_seed(0)
    loss = PlackettLuce(group_size=2, groups=50)(rewards, batch).loss
    # Every list that counts has a gap of 1.5: the tied pair of the first comparison changes nothing.
    expected = [math.log1p(math.exp(-1.5)), 0.0, math.log1p(math.exp(-1.0))]
    assert loss.tolist() == pytest.approx(expected, abs=1e-12)
    loss.sum().backward()
    assert rewards.grad[3:5].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "objective", [PlackettLuce(group_size=2, groups=3), PlackettLuce(ties="random")], ids=repr
)
def test_draws_come_from_the_generator_that_is_checkpointed(objective):
    batch = batch_of(((1, 2, 1, 1), (0, 1, 1, 1)))
    rewards = double(*REWARDS[:5])
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = [objective(rewards, batch).loss.item() for _ in range(4)]
    torch.set_rng_state(state)
    assert [objective(rewards, batch).loss.item() for _ in range(4)] == first
    assert len(set(first)) > 1


def test_a_comparison_of_one_rank_counts_as_chance():
    metrics = PlackettLuce()(double(1.0, 2.0), batch_of(((1, 1), (0, 0)))).metrics
    assert metrics["rank/accuracy"].tolist() == [0.5]


def test_a_large_tie_is_refused_unless_its_order_is_random():
    batch, rewards = batch_of(((1,) * 13, (0,) * 13)), torch.zeros(13)
    with pytest.raises(UserError, match="13") as caught:
        PlackettLuce()(rewards, batch)
    assert caught.value.code == "too-many-ties"
    assert PlackettLuce(ties="random")(rewards, batch).loss.item() == pytest.approx(math.lgamma(14), rel=1e-6)
