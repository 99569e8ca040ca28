"""Returns and baselines of token rewards, and their bounds and weights (TLM)."""

import math
from itertools import product

import pytest
import torch

from tokenward import losses
from tokenward.ops.policy_gradient import baseline_leave_one_out, baseline_mean, return_to_go
from tokenward.ops.ragged import segment_sum
from tokenward.ops.transforms import bound_sigmoid, bound_softplus, likelihood_weights

OWNER = torch.tensor([0, 0, 0, 1, 1])
ONES = torch.ones(5)


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_softplus_bound_by_hand():
    # u = 2 - log(1 + e^2) = -0.1269280;  r = 0 + log(1 + e^-0.1269280) = 0.6316957
    assert bound_softplus(double(0.0), 0.0, 2.0).item() == pytest.approx(0.6316957, abs=1e-7)
    # tlm.md 1.2, results of the published code.
    published = bound_softplus(double(-5.0, -1.0, 0.0, 1.0, 5.0), 1e-8, 1.0)
    assert published.tolist() == pytest.approx([0.0067, 0.2807, 0.54873, 0.8583, 1.3000], abs=5e-5)
    # Rewards stay positive in float32.
    assert bound_softplus(torch.tensor([-50.0]), 1e-8, 1.0).item() == pytest.approx(1e-8)
    assert bound_softplus(torch.tensor([-50.0]), 1e-8, 1.0, exact=True).item() > 0
    assert bound_sigmoid(double(0.0), -1.0, 3.0).item() == 1.0


def test_bounds_are_monotone_and_reach_their_limits():
    z = torch.linspace(-60, 60, 24001, dtype=torch.float64)
    published, exact = bound_softplus(z, 1e-8, 1.0), bound_softplus(z, 1e-8, 1.0, exact=True)
    sigmoid = bound_sigmoid(z, -1.0, 3.0)
    for bounded, low, high in ((published, 1e-8, 1.3132617), (exact, 1e-8, 1.0), (sigmoid, -1.0, 3.0)):
        assert (bounded.diff() >= 0).all()
        assert (bounded.diff()[11000:13000] > 0).all()
        assert bounded[0].item() == pytest.approx(low, abs=1e-12)
        assert bounded[-1].item() == pytest.approx(high, abs=1e-7)
    assert exact.max() <= 1.0
    # torch's softplus switches to the identity above 20, a step of 2e-9 down.
    z = -19.0 + 1e-10 * torch.arange(-100, 100, dtype=torch.float64)
    assert (bound_softplus(z, 0.0, 1.0).diff() > 0).all()


@pytest.mark.parametrize("exact", [False, True])
def test_gradient_of_the_bound(exact):
    z = double(-30.0, -2.0, 0.0, 1.5, 30.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda raw: bound_softplus(raw, 0.1, 0.9, exact=exact), z)


def test_likelihood_weights_by_hand():
    given = double(1.0, 2.0, 1.0, 3.0, 1.0), ONES, OWNER, 2
    assert likelihood_weights(*given).tolist() == pytest.approx([0.25, 0.5, 0.25, 0.75, 0.25])
    squared = likelihood_weights(*given, transform="power", power=2.0)
    assert squared.tolist() == pytest.approx([1 / 6, 4 / 6, 1 / 6, 0.9, 0.1])
    # e^(1/2), e^(2/2), e^(1/2): shares 1 / (2 + e^0.5) and the rest;  e^1.5 : e^0.5 = sigma(1)
    soft = likelihood_weights(*given, transform="exp", temperature=2.0)
    assert soft.tolist() == pytest.approx([0.2740686, 0.4518628, 0.2740686, 0.7310586, 0.2689414], abs=1e-7)
    mixed = likelihood_weights(*given, uniform=0.4)
    assert mixed[3:].tolist() == pytest.approx([0.6 * 0.75 + 0.2, 0.6 * 0.25 + 0.2])
    assert likelihood_weights(*given, uniform=1.0).tolist() == pytest.approx([1 / 3] * 3 + [0.5] * 2)


@pytest.mark.parametrize(
    "settings", [{}, {"transform": "exp"}, {"transform": "power", "power": 0.5}, {"uniform": 0.3}]
)
def test_likelihood_weights_sum_to_one(settings):
    """The third of four sequences has no token, and no token of the fourth counts."""
    rewards = torch.tensor([1.3, 0.2, math.nan, 1e-8, 40.0, -math.inf, 1.0], requires_grad=True)
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 2.0, 0.0, 0.0])
    owner = torch.tensor([0, 0, 0, 1, 1, 1, 3])
    shares = likelihood_weights(rewards, weights, owner, 4, **settings)
    assert segment_sum(shares, owner, 4).tolist() == pytest.approx([1.0, 1.0, 0.0, 0.0])
    assert shares[[2, 5, 6]].tolist() == [0.0, 0.0, 0.0]
    assert (shares >= 0).all()
    assert not shares.requires_grad


def test_invariances_of_likelihood_weights():
    rewards, rest = double(0.3, 1.1, 0.6, 0.9, 0.2), (ONES, OWNER, 2)
    plain, soft = likelihood_weights(rewards, *rest), likelihood_weights(rewards, *rest, transform="exp")
    torch.testing.assert_close(likelihood_weights(7.0 * rewards, *rest), plain, rtol=0, atol=1e-14)
    moved = likelihood_weights(rewards + 900.0, *rest, transform="exp")
    torch.testing.assert_close(moved, soft, rtol=0, atol=1e-12)
    # A shift changes the paper's weights: the zero of the rewards is part of the method.
    assert (likelihood_weights(rewards + 1.0, *rest) - plain).abs().max() > 0.05


def test_returns():
    rewards = double(1.0, 2.0, 4.0, 3.0, 5.0)
    assert return_to_go(rewards, OWNER).tolist() == [7.0, 6.0, 4.0, 8.0, 5.0]
    assert return_to_go(rewards, OWNER, 0.5).tolist() == [3.0, 4.0, 4.0, 5.5, 5.0]
    assert return_to_go(rewards, OWNER, 0.0).tolist() == rewards.tolist()
    lengths = torch.tensor([1, 37, 64, 5, 1, 2])
    rewards = torch.randn(110, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = []
    for part in rewards.split(lengths.tolist()):
        returns, running = [], 0.0
        for reward in reversed(part.tolist()):
            running = reward + 0.93 * running
            returns.append(running)
        expected += reversed(returns)
    found = return_to_go(rewards, torch.arange(6).repeat_interleave(lengths), 0.93)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)


def test_baselines_by_hand():
    # Means 2, 4, 9 of the first comparison, 6 of the second.
    values = double(1.0, 3.0, 4.0, 8.0, 10.0, 6.0)
    given = torch.tensor([0, 0, 1, 2, 2, 3]), torch.tensor([0, 0, 0, 1]), 2
    assert baseline_mean(values, *given).tolist() == [5.0] * 5 + [6.0]
    assert baseline_leave_one_out(values, *given).tolist() == [6.5, 6.5, 5.5, 3.0, 3.0, 0.0]
    # Response 1 has no tokens.
    given = torch.tensor([0, 2]), torch.tensor([0, 0, 0]), 1
    assert baseline_mean(double(1.0, 3.0), *given).tolist() == [2.0, 2.0]
    assert baseline_leave_one_out(double(1.0, 3.0), *given).tolist() == [3.0, 1.0]


def test_leave_one_out_does_not_depend_on_the_response_itself():
    given = torch.tensor([0, 0, 1]), torch.tensor([0, 0]), 1
    before = baseline_leave_one_out(double(1.0, 2.0, 5.0), *given)
    assert before[0] == baseline_leave_one_out(double(-9.0, 7.0, 5.0), *given)[0] == 5.0


@pytest.mark.parametrize("baseline", ["none", "leave_one_out"])
@pytest.mark.parametrize("credit", [{"discount": 1.0}, {"spread": "sequence"}], ids=["token", "sequence"])
def test_the_expected_gradient_of_a_sum_is_that_of_the_expected_return(credit, baseline):
    """All pairs of replies of a policy that stops at once or goes on to one of two tokens, each with its probability.

    A reward for each token and one for the reply thus differ in their noise, not in what they expect.
    """
    choices = torch.tensor([0.3, -0.4], dtype=torch.float64, requires_grad=True)
    (stop, go), (left, right) = (
        torch.nn.functional.logsigmoid(torch.stack([c, -c])) for c in choices.unbind()
    )
    nothing = torch.zeros_like(stop)
    replies = [  # log-probabilities, weights and rewards of at most two tokens
        (torch.stack([stop, nothing]), [1.0, 0.0], [0.7, 0.0]),
        (torch.stack([go, left]), [1.0, 1.0], [0.2, 1.1]),
        (torch.stack([go, right]), [1.0, 1.0], [0.2, -0.5]),
    ]
    returns = sum(logp.sum().exp() * sum(rewards) for logp, _, rewards in replies)
    (expected,) = torch.autograd.grad(returns, choices, retain_graph=True)
    found = {"sum": torch.zeros(2, dtype=torch.float64), "token": torch.zeros(2, dtype=torch.float64)}
    for drawn in product(replies, repeat=2):
        logp, weights, rewards = zip(*drawn, strict=True)
        chance = torch.stack(logp).sum().exp().detach()
        given = torch.stack(logp)[None], double(*weights)[None], double(*rewards)[None]
        for over, total in found.items():
            loss = losses.reinforce(*given, mean_over=over, baseline=baseline, **credit).sum()
            total -= chance * torch.autograd.grad(loss, choices, retain_graph=True)[0]
    torch.testing.assert_close(found["sum"], expected, rtol=0, atol=1e-12)
    first, second = found["token"] * expected.flip(0)
    assert abs(float(first - second)) > 1e-4, "the other means have another direction"
