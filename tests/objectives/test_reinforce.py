"""Objectives of single responses: by hand, and over all sequences of a tiny vocabulary against the paper's formulas."""

from itertools import product

import pytest
import torch

from tests.objectives.tools import double, flat_batch
from tokenward.errors import UserError
from tokenward.objectives import SFT, Reinforce, WeightedLikelihood
from tokenward.selection import ScoredTokens, SoftWeights
from tokenward.tokens.batches import Needs

# One comparison of two responses.
LOGP, SCORES, ENTROPY = (-1.0, -2.0, -0.5), (2.0, 1.0, 4.0), (0.5, 1.0, 0.75)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # (2 x 1 + 1 x 2 + 4 x 0.5) / 3 - 0.125 x 0.75
        ({}, 2.0 - 0.09375),
        ({"entropy": 0.0}, 2.0),
        # ((2 + 2) / 2 + 2) / 2 - 0.125 x (0.75 + 0.75) / 2
        ({"normaliser": "sequence"}, 2.0 - 0.09375),
        ({"normaliser": "sequence", "entropy": 0.0, "return_to_go": True}, ((3.0 + 2.0) / 2 + 2.0) / 2),
        # Returns 3, 1 | 4, or 2.5, 1 | 4 when half of what comes counts.
        ({"entropy": 0.0, "return_to_go": True}, (3.0 + 2.0 + 2.0) / 3),
        ({"entropy": 0.0, "return_to_go": True, "discount": 0.5}, (2.5 + 2.0 + 2.0) / 3),
        # Sums 3, 3 | 4
        ({"entropy": 0.0, "spread": "sequence"}, (3.0 + 6.0 + 2.0) / 3),
        # Means of the responses 1.5 and 4: their mean 2.75, the other one 4 | 1.5.
        ({"entropy": 0.0, "baseline": "mean"}, (-0.75 - 3.5 + 0.625) / 3),
        ({"entropy": 0.0, "baseline": "leave_one_out"}, (-2.0 - 6.0 + 1.25) / 3),
        # Ratios 0.5, -0.5, 1 lower the rewards by 0.1, -0.1, 0.2.
        ({"entropy": 0.0, "kl": 0.2}, (1.9 + 2.2 + 1.9) / 3),
    ],
)
def test_reinforce_by_hand(settings, expected):
    batch = flat_batch((2, 1), scores=SCORES, entropy=ENTROPY, reference=(-1.5, -1.5, -1.5))
    losses = Reinforce(**settings)(double(*LOGP), batch)
    assert losses.loss.tolist() == pytest.approx([expected], abs=1e-12)


def test_the_metrics_of_reinforce():
    batch = flat_batch((2, 1), (1,), scores=(*SCORES, 9.0), entropy=(*ENTROPY, 0.1), reference=(-1.5,) * 4)
    logp = double(*LOGP, -1.0)
    losses = Reinforce(kl=0.2, baseline="mean")(logp, batch)
    found = {name: value.tolist() for name, value in losses.metrics.items()}
    assert found == {
        "reward/token": pytest.approx([7 / 3, 9.0]),
        "entropy": pytest.approx([0.75, 0.1]),
        "kl": pytest.approx([1 / 3, 0.5]),
    }
    assert not any(value.requires_grad for value in losses.metrics.values())
    assert set(Reinforce(entropy=0.0)(logp, batch).metrics) == {"reward/token"}


def test_no_gradient_reaches_the_rewards():
    for objective in (Reinforce(), Reinforce(baseline="leave_one_out", kl=0.3, return_to_go=True)):
        scores = double(*SCORES)
        batch = flat_batch((2, 1), scores=scores, entropy=ENTROPY, reference=(-1.5,) * 3)
        objective(double(*LOGP), batch).loss.sum().backward()
        assert scores.grad is None


def test_the_gradient_of_reinforce_is_minus_the_reward():
    logp, entropy = double(*LOGP), double(*ENTROPY)
    # Through the KL's ratio nothing flows: the rewards 1.9, 1.1, 3.8 are constants.
    batch = flat_batch((2, 1), scores=SCORES, entropy=entropy, reference=(-1.5,) * 3)
    Reinforce(kl=0.2)(logp, batch).loss.sum().backward()
    assert logp.grad.tolist() == pytest.approx([-1.9 / 3, -1.1 / 3, -3.8 / 3], abs=1e-12)
    assert entropy.grad.tolist() == pytest.approx([-0.125 / 3] * 3)


# All sequences of two tokens out of three: a state is the first token, or the start.
VOCABULARY, LENGTH = 3, 2
SEQUENCES = list(product(range(VOCABULARY), repeat=LENGTH))
FIRST, SECOND = (torch.tensor([sequence[place] for sequence in SEQUENCES]) for place in range(LENGTH))
STATES = torch.stack((torch.zeros_like(FIRST), 1 + FIRST), 1).flatten()
TOKENS = torch.tensor(SEQUENCES).flatten()
REWARD = torch.randn(
    1 + VOCABULARY, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(4)
)


def random_policy(seed: int = 0) -> torch.Tensor:
    """Logits of every state."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1 + VOCABULARY, VOCABULARY, dtype=torch.float64, generator=generator).requires_grad_()


def expected_gradient(objective, logits, reward=REWARD, reference=None) -> torch.Tensor:
    """Gradient of the loss on a sampled sequence, in expectation over the policy's samples."""
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)[STATES]
    batch = flat_batch(
        *[(LENGTH,)] * len(SEQUENCES),
        scores=reward[STATES, TOKENS],
        entropy=entropy,
        reference=None if reference is None else reference.log_softmax(-1)[STATES, TOKENS],
    )
    chosen = logp[STATES, TOKENS]
    probability = chosen.detach().reshape(-1, LENGTH).sum(1).exp()
    return torch.autograd.grad((probability * objective(chosen, batch).loss).sum(), logits)[0]


def state_probability(logits) -> torch.Tensor:
    return torch.cat((torch.ones(1, dtype=torch.float64), logits[0].softmax(-1)))


def test_the_expected_gradient_is_the_posters():
    """E_t { E_{a ~ pi} [ r(s_t, a) grad log pi(a | s_t) ] + alpha grad H(pi(. | s_t)) } at states the policy reaches."""
    logits, alpha = random_policy(), 0.3
    p = logits.softmax(-1)
    inside = (p * REWARD).sum(-1) - alpha * (p * p.log()).sum(-1)
    # grad E_a[r] = E_a[r grad log pi], the probability of the state held fixed.
    poster = (state_probability(logits).detach() * inside).sum() / LENGTH
    found = expected_gradient(Reinforce(entropy=alpha), logits)
    torch.testing.assert_close(-found, torch.autograd.grad(poster, logits)[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("objective", [Reinforce(), Reinforce(return_to_go=True)], ids=repr)
def test_a_constant_added_to_every_reward_leaves_the_expectation(objective):
    logits = random_policy(1)
    plain = expected_gradient(objective, logits)
    moved = expected_gradient(objective, logits, REWARD + 3.0)
    assert plain.abs().max() > 0.01
    torch.testing.assert_close(moved, plain, rtol=0, atol=1e-14)


def test_one_reward_for_all_tokens_has_the_expectation_of_returns():
    """A token's factor may have rewards before it, which it cannot change: they add noise alone."""
    logits = random_policy(5)
    returns, spread = (
        expected_gradient(Reinforce(entropy=0.0, **settings), logits)
        for settings in ({"return_to_go": True}, {"spread": "sequence"})
    )
    assert returns.abs().max() > 0.01
    torch.testing.assert_close(spread, returns, rtol=0, atol=1e-14)


def test_leaving_one_out_leaves_the_expectation_and_lowers_the_variance():
    """One step, two independent samples per comparison, over all pairs of them."""
    logits = random_policy(2)[0].detach().requires_grad_()
    reward = REWARD[0] + 5.0
    pairs = torch.tensor(list(product(range(VOCABULARY), repeat=2)))
    gradients = {}
    for baseline in ("none", "leave_one_out"):
        batch = flat_batch(*[(1, 1)] * len(pairs), scores=reward[pairs.flatten()])
        logp = logits.log_softmax(-1)[pairs.flatten()]
        losses = Reinforce(entropy=0.0, baseline=baseline)(logp, batch).loss
        rows = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in losses]
        gradients[baseline] = torch.stack(rows)
    probability = logits.detach().softmax(-1)[pairs].prod(1)[:, None]
    plain, centred = ((probability * gradients[name]).sum(0) for name in ("none", "leave_one_out"))
    torch.testing.assert_close(centred, plain, rtol=0, atol=1e-14)
    size = {name: (probability * value.square()).sum() for name, value in gradients.items()}
    assert size["leave_one_out"] < 0.5 * size["none"]


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_the_immediate_reward_settles_at_the_exponential_of_the_reward_at_every_state(alpha):
    optimum = (REWARD / alpha).clone().requires_grad_()
    found = expected_gradient(Reinforce(entropy=alpha), optimum)
    assert found.abs().max() < 1e-13
    off = expected_gradient(Reinforce(entropy=alpha), (1.1 * REWARD / alpha).requires_grad_())
    assert off.abs().max() > 1e-4


def test_the_kl_penalty_pulls_towards_the_reference():
    # At the optimum pi is proportional to (ref^kl exp(r))^(1 / (kl + alpha)).
    reference = random_policy(3).detach()
    kl, alpha = 0.4, 0.2
    optimum = ((REWARD + kl * reference.log_softmax(-1)) / (kl + alpha)).requires_grad_()
    found = expected_gradient(Reinforce(entropy=alpha, kl=kl), optimum, reference=reference)
    assert found.abs().max() < 1e-13


def true_return(logits, reward) -> torch.Tensor:
    p = logits.softmax(-1)
    return (state_probability(logits) * (p * reward).sum(-1)).sum()


@pytest.mark.parametrize("normaliser", ["token", "sequence"])
def test_with_the_return_to_go_the_gradient_is_that_of_the_expected_return(normaliser):
    logits = random_policy(5)
    objective = Reinforce(entropy=0.0, return_to_go=True, normaliser=normaliser)
    found = expected_gradient(objective, logits)
    expected = torch.autograd.grad(true_return(logits, REWARD), logits)[0] / LENGTH
    torch.testing.assert_close(-found, expected, rtol=0, atol=1e-14)
    myopic = expected_gradient(Reinforce(entropy=0.0), logits)
    assert (myopic + expected).abs().max() > 0.01


def test_the_immediate_reward_walks_into_a_trap_and_the_return_does_not():
    """Token 0 pays 1 now and costs 5 whatever follows; the others pay nothing and lose nothing."""
    trap = torch.zeros_like(REWARD)
    trap[0, 0], trap[1] = 1.0, -5.0
    logits = torch.zeros_like(REWARD).requires_grad_()
    myopic = -expected_gradient(Reinforce(entropy=0.0), logits, trap)[0]
    returns = -expected_gradient(Reinforce(entropy=0.0, return_to_go=True), logits, trap)[0]
    # p (r - mean) / 2 with p = 1/3: rewards (1, 0, 0), returns (-4, 0, 0).
    assert myopic.tolist() == pytest.approx([1 / 9, -1 / 18, -1 / 18])
    assert returns.tolist() == pytest.approx([-4 / 9, 2 / 9, 2 / 9])


def test_what_reinforce_needs():
    assert Reinforce().needs == Needs(scores=True, entropy=True)
    assert Reinforce(kl=0.1, entropy=0.0).needs == Needs(scores=True, reference=True)
    with pytest.raises(UserError) as caught:
        Reinforce(entropy=0.0)(double(*LOGP), flat_batch((2, 1)))
    assert caught.value.code == "missing-scores"


def test_likelihood_by_hand():
    # Of ranks 1 and 0 the second counts: 1 x 0.5 + 3 x 1 = 3.5, over 1 + 3 or over its three tokens.
    batch = flat_batch((1, 3), weights=(5.0, 1.0, 0.0, 3.0), ranks=[(1, 0)])
    logp = double(-9.0, -0.5, -7.0, -1.0)
    assert WeightedLikelihood()(logp, batch).loss.tolist() == [0.875]
    assert WeightedLikelihood(normaliser="length")(logp, batch).loss.tolist() == pytest.approx([3.5 / 3])
    # Any number of responses; tied best ones count as one sequence.
    batch = flat_batch((1, 1, 1), (1, 1), ranks=[(2, 0, 1), (0, 0)])
    assert SFT()(double(-1.0, -2.0, -4.0, -3.0, -6.0), batch).loss.tolist() == [2.0, 4.5]


@pytest.mark.parametrize(("normaliser", "sizes"), [("step_weights", [4.0, 2.0]), ("step_length", [3.0, 1.0])])
def test_a_denominator_over_the_step_by_hand(normaliser, sizes):
    # As above, and a second comparison: 2 x 6. The step's loss is 15.5 / 6, or 15.5 / 4 tokens of best responses.
    weights = (5.0, 1.0, 0.0, 3.0, 2.0, 7.0)
    batch = flat_batch((1, 3), (1, 1), weights=weights, ranks=[(1, 0), (0, 1)])
    losses = WeightedLikelihood(normaliser=normaliser)(double(-9.0, -0.5, -7.0, -1.0, -6.0, -8.0), batch)
    assert losses.loss.tolist() == [3.5, 12.0]
    assert losses.denominator.tolist() == sizes
    assert losses.metrics["nll"].tolist() == pytest.approx([3.5 / sizes[0], 12.0 / sizes[1]])


def test_equal_weights_are_fine_tuning_and_only_proportions_matter():
    def loss(weights):
        return WeightedLikelihood()(double(-1.0, -2.0, -4.5), flat_batch((3,), weights=weights)).loss.item()

    assert loss(None) == loss((0.25, 0.25, 0.25)) == 2.5
    assert loss((0.2, 0.4, 0.8)) == pytest.approx(loss((1.6, 3.2, 6.4)), abs=1e-15)


@pytest.mark.parametrize("normaliser", ["weights", "length"])
def test_a_unigram_policy_settles_at_the_total_weight_of_each_token(normaliser):
    """Three sequences over four tokens, weighed by random rewards: pi(v) is proportional to the weight on v."""
    lengths, ids = (4, 2, 3), torch.tensor([0, 1, 1, 3, 2, 0, 3, 3, 1])
    rewards = torch.rand(9, generator=torch.Generator().manual_seed(0)) + 0.1
    response = torch.arange(3).repeat_interleave(torch.tensor(lengths))
    scored = ScoredTokens(
        rewards, response, torch.arange(3), torch.zeros(3), torch.zeros(9, dtype=torch.bool), torch.arange(3)
    )
    weights = SoftWeights()(scored).double()
    # Weights average 1 in each response: both normalisers divide by its length.
    share = weights / torch.tensor(lengths)[response]
    logits = torch.zeros(4, dtype=torch.float64).index_add(0, ids, share).log().requires_grad_()
    batch = flat_batch(*((length,) for length in lengths), weights=weights)
    loss = WeightedLikelihood(normaliser=normaliser)(logits.log_softmax(-1)[ids], batch).loss.sum()
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-6
    assert batch.weights.requires_grad is False
