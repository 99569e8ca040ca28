"""Objectives over pairs against numbers worked by hand, and equalities between methods."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.objectives.tools import double, flat_batch
from tokenward.objectives import (
    DPO,
    IPO,
    KTO,
    ORPO,
    TBPO,
    TDPO,
    Pairwise,
    SePO,
    SimPO,
    SparsePO,
    TokenKL,
    TReg,
    WeightedLikelihood,
)  # fmt: skip
from tokenward.ops.losses import one_sample_kl

# One pair: two chosen tokens, three rejected ones. Log-ratios 0.5, 0.5 | 1, -1, -0.5; sums 1 | -0.5.
LOGP = (-1.0, -2.0, -1.0, -4.0, -2.5)
REFERENCE = [-1.5, -2.5, -2.0, -3.0, -2.0]
KL = [0.1, 0.3, 0.2, 0.4, 0.5]  # sums 0.4 | 1.1
STATES = torch.tensor([[1.0, 9], [2, 9], [4, 9], [-20, 9], [7, 9]], dtype=torch.float64)
LAYERS = torch.tensor([[[3.0, 1.0], [1.0, 3.0]]], dtype=torch.float64).expand(5, 2, 2)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def pair(weights=None, **values):
    return flat_batch((2, 3), **{"weights": weights, "reference": REFERENCE, "kl": KL, **values})


def loss_of(objective, batch=None, logp=LOGP) -> float:
    return objective(double(*logp), pair() if batch is None else batch).loss.item()


def slopes_of(objective, batch=None):
    """Gradients of the loss by log-probabilities and by divergences."""
    batch = pair() if batch is None else batch
    logp, kl = double(*LOGP), batch.statistics["kl"].clone().requires_grad_()
    loss = objective(logp, replace(batch, statistics={"kl": kl})).loss.sum()
    return torch.autograd.grad(loss, [logp, kl], allow_unused=True)


S = (1 + math.exp(0.1)) ** -1
TIS = TDPO(alpha=-0.5, direction="reverse", stop_gradient="none")
BOTH = {"sides": "both"}


@pytest.mark.parametrize(
    ("objective", "weights", "expected"),
    [
        # 0.2 x 1.5 = 0.3; weights 1, 0 | 0, 2, 0: 0.5 and -2, 0.2 x 2.5 = 0.5.
        (DPO(beta=0.2), None, softplus(-0.3)),
        (DPO(beta=0.2), [1.0, 0.0, 0.0, 2.0, 0.0], softplus(-0.5)),
        # D2PO, 0.9^t from t = 1: 0.45 + 0.405 and 0.9 - 0.81 - 0.3645.
        (DPO(beta=0.2), [0.9, 0.81, 0.9, 0.81, 0.729], softplus(-0.2 * (0.855 + 0.2745))),
        # TGDPO's weights may be negative: 0.5 and -1 - 1 - 0.25.
        (DPO(beta=0.2), [1.5, -0.5, -1.0, 1.0, 0.5], softplus(-0.55)),
        # Selected: -2 | -1, -4, means -2 and -2.5; 2 x 0.5 - 0.5.
        (SePO(gamma=2.0, margin=0.5), [0.0, 1.0, 1.0, 1.0, 0.0], softplus(-0.5)),
        (SePO(gamma=1.5), [0.0, 1.0, 1.0, 1.0, 0.0], softplus(-1.5 * (-2 / 1 + 5 / 2))),
        (SePO(gamma=1.5, normaliser="none"), [0.0, 1.0, 1.0, 1.0, 0.0], softplus(-1.5 * (-2 + 5))),
        (SePO(gamma=1.5, normaliser="length"), [0.0, 1.0, 1.0, 1.0, 0.0], softplus(-1.5 * (-2 / 2 + 5 / 3))),
        (
            SePO(gamma=1.5, normaliser="rate", chosen_rate=0.4, rejected_rate=0.5),
            [0.0, 1.0, 1.0, 1.0, 0.0],
            softplus(-1.5 * (-2 / 0.8 + 5 / 1.5)),
        ),
        (SePO(profile="official"), [0.0, 1.0, 1.0, 1.0, 0.0], softplus(-0.5)),
        # The pairwise family: u 1 and -0.5, z = 0.2 x 1.5 = 0.3.
        (Pairwise(beta=0.2, margin=0.1), None, softplus(-0.2)),
        (Pairwise(beta=0.2, link="hinge"), None, 0.7),
        (Pairwise(beta=0.2, label_smoothing=0.1), None, 0.9 * softplus(-0.3) + 0.1 * softplus(0.3)),
        (
            Pairwise(beta=0.2, link="robust", label_smoothing=0.1),
            None,
            (0.9 * softplus(-0.3) - 0.1 * softplus(0.3)) / 0.8,
        ),
        (Pairwise(beta=0.2, link="kliep"), None, math.exp(-0.3) - 0.3),
        (Pairwise(beta=0.2, link="sba"), None, (math.exp(-0.3) - 0.3) / 4),
        (Pairwise(beta=0.2, link="lsif"), None, math.exp(-0.6) - 2 * math.exp(0.3)),
        # Means over tokens: 0.5 and -0.5 / 3.
        (Pairwise(beta=0.2, link="ipo", aggregate="mean"), None, (0.5 + 0.5 / 3 - 2.5) ** 2),
        (Pairwise(beta=0.2, reference=False, aggregate="length"), None, softplus(-0.2 * (-1.5 + 2.5))),
        # TDPO: 0.2 (1.5 - 0.5 x 0.7) = 0.23.
        (TDPO(beta=0.2), None, softplus(-0.23)),
        # Weights 0.7, 1.3 | 1.3, 1, 0.7: ratios 1 and -0.05; divergences 0.46 and 1.01;
        # 0.1 (1.05 - 0.5 (0.46 - 1.01)) = 0.1325.
        (TIS, [0.7, 1.3, 1.3, 1.0, 0.7], softplus(-0.1325)),
        # A divergence counts with the absolute weight: a sign affects only the ratio, -0.35 + 0.65 = 0.3.
        (TIS, [-0.7, 1.3, 1.3, 1.0, 0.7], softplus(-0.1 * (0.35 + 0.5 * 0.55))),
        # MaPO: weights as masks 1, 0.5 | 0, 1, 0.2: u 0.75 and -1.1; divergences 0.25 and 0.5; 0.2 (1.85 - 0.25).
        (SparsePO(beta=0.2, masks="weights"), [1.0, 0.5, 0.0, 1.0, 0.2], softplus(-0.32)),
        # z = (0.4 + 1.1) / 2 = 0.75; 1 - sigma(0.2 x 0.25), 1 - sigma(0.2 x 1.25); their mean, the second twice.
        (KTO(beta=0.2, undesirable=2.0), None, (1 / (1 + math.exp(0.05)) + 2 / (1 + math.exp(0.25))) / 2),
        (KTO(beta=0.2, anchor="zero"), None, (1 / (1 + math.exp(0.2)) + 1 / (1 + math.exp(0.1))) / 2),
        # Token rewards 0.2, -0.1 | 0.3, 0, 0.4; the fourth of exactly 0 counts nowhere. Rewards of the tokens with weight
        # 0.2 x 1 and 0.2 x (1 - 0.5): s = sigma(0.1 - 0.2); -s 0.2 (-0.2 + 0.2 - 0.3 - 1) = s 0.2 x 1.3.
        (TReg(beta=0.2), [0.2, -0.1, 0.3, 0.0, 0.4], S * 0.26),
        # 0.1 + 2 x 0.3 = 0.7 and 0.2 + 0.5 = 0.7; unweighted 0.4 and 0.9.
        (TokenKL(), [1.0, -2.0, 0.0, 0.5, 1.0], 1.4),
        (TokenKL(weighted=False), [1.0, -2.0, 0.0, 0.5, 1.0], 1.3),
        (TokenKL(sides="difference", weighted=False), [1.0, -2.0, 0.0, 0.5, 1.0], 0.5),
        # Likelihood, best: 1 x 1 - 0.5 x 2 = 0 over 1.5; both: 0 + 8 - 2.5 = 5.5 over 4.5, over 5 tokens, or whole.
        (WeightedLikelihood(), [1.0, -0.5, 0.0, 2.0, -1.0], 0.0),
        (WeightedLikelihood(**BOTH), [1.0, -0.5, 0.0, 2.0, -1.0], 5.5 / 4.5),
        (WeightedLikelihood(**BOTH, normaliser="length"), [1.0, -0.5, 0.0, 2.0, -1.0], 1.1),
        (WeightedLikelihood(**BOTH, normaliser="none"), [1.0, -0.5, 0.0, 2.0, -1.0], 5.5),
        (WeightedLikelihood(), [0.0, 0.0, 1.0, 1.0, 1.0], 0.0),
    ],
    ids=repr,
)
def test_by_hand(objective, weights, expected):
    assert loss_of(objective, pair(weights)) == pytest.approx(expected, abs=1e-9)


def test_metrics_by_hand():
    rewards = {
        "rewards/chosen": pytest.approx([0.2]),
        "rewards/rejected": pytest.approx([-0.1]),
        "rewards/margins": pytest.approx([0.3]),
        "rewards/accuracies": [1.0],
    }
    logps = {
        "logps/chosen": [-3.0],
        "logps/chosen_per_token": [-1.5],
        "logps/chosen_change_per_token": [0.5],
        "logps/rejected": [-7.5],
        "kept/chosen": [1.0],
        "kept/rejected": [1.0],
    }

    def metrics(objective, batch, logp=LOGP):
        found = objective(double(*logp), batch).metrics
        return {name: value.tolist() for name, value in found.items()}

    assert metrics(DPO(beta=0.2), pair()) == rewards | logps
    found = metrics(DPO(beta=0.2), pair([1.0, 0.0, 0.0, 2.0, 0.0]))
    assert (found["logps/rejected"], found["kept/chosen"]) == ([-8.0], [0.5])
    assert found["kept/rejected"] == pytest.approx([1 / 3])
    # Selected: means -2 and -2.5, times 2.
    found = metrics(SePO(), pair([0.0, 1.0, 1.0, 1.0, 0.0], reference=None))
    assert (found["rewards/chosen"], found["rewards/rejected"]) == ([-4.0], [-5.0])
    assert "logps/chosen_change_per_token" not in found
    assert metrics(KTO(beta=0.2), pair())["kl"] == pytest.approx([0.75])
    # A tie is not right.
    assert metrics(SePO(), flat_batch((1, 1)), (-1.0, -1.0))["rewards/accuracies"] == [0.0]


def test_changes_per_token_are_means_over_the_weight_of_the_chosen_response():
    # Two pairs: weights 1, 3 on changes 0.5, -0.5; then no weight at all on the chosen side.
    logp = double(-1.0, -2.5, -1.0, -7.0, -1.0)
    batch = flat_batch(
        (2, 1), (1, 1), weights=[1.0, 3.0, 1.0, 0.0, 1.0], reference=[-1.5, -2.0, -1.0, -1.0, -1.0]
    )
    metrics = DPO()(logp, batch).metrics
    assert metrics["logps/chosen_change_per_token"].tolist() == [(0.5 - 3 * 0.5) / 4, 0.0]
    assert metrics["logps/chosen_per_token"].tolist() == [(-1.0 - 3 * 2.5) / 4, 0.0]


def test_law_2_sepo_of_every_token_is_simpo():
    batch = flat_batch((2, 3), (4, 1), (1, 1))
    logp = [-0.5 * (index % 5) - 0.1 * index for index in range(12)]
    ours, theirs = double(*logp), double(*logp)
    sepo = SePO(gamma=2.5, margin=0.7)(ours, batch).loss
    means = torch.stack([part.mean() for part in theirs.split([2, 3, 4, 1, 1, 1])])
    written_out = -F.logsigmoid(2.5 * (means[0::2] - means[1::2]) - 0.7)
    assert torch.equal(sepo, SimPO(beta=2.5, gamma=0.7)(ours, batch).loss)
    torch.testing.assert_close(sepo, written_out, rtol=0, atol=1e-14)
    sepo.sum().backward()
    written_out.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-14)


def test_the_gradient_by_the_logits_is_the_formula():
    """sepo.md 3.3: -(gamma / K_w) sigma(-D) (onehot - softmax) at selected chosen tokens, 0 where unselected."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(7, 5, generator=generator, dtype=torch.float64).requires_grad_()
    ids = torch.tensor([0, 3, 1, 4, 2, 2, 0])
    selected = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    gamma, margin = 2.3, 0.4
    logp = logits.log_softmax(-1)[torch.arange(7), ids]
    loss = SePO(gamma=gamma, margin=margin)(logp, flat_batch((3, 4), weights=selected)).loss
    loss.backward()
    with torch.no_grad():
        d = gamma * (logp[[0, 2]].mean() - logp[[4, 5, 6]].mean()) - margin
        direction = F.one_hot(ids, 5) - logits.softmax(-1)
        # K_w = 2, K_l = 3
        factor = gamma * torch.sigmoid(-d) * torch.tensor([-1 / 2] * 3 + [1 / 3] * 4, dtype=torch.float64)
        expected = factor[:, None] * direction * selected[:, None]
    torch.testing.assert_close(logits.grad, expected, rtol=0, atol=1e-15)
    assert logits.grad[[1, 3]].tolist() == [[0.0] * 5] * 2


def test_negative_weights_push_the_other_way_whatever_the_normaliser():
    """A sum of negative weights as the denominator would turn each of them round again."""
    for objective in (SePO(), SimPO(), Pairwise(beta=2.0, reference=False, aggregate="mean")):
        up, down = (loss_of(objective, pair([weight] * 5)) for weight in (0.5, -0.5))
        # The means of log-probabilities are -1.5 and -2.5: the scaled margins are 2 and -2, less SimPO's gamma.
        margin = math.log(math.expm1(down)) - math.log(math.expm1(up))
        assert margin == pytest.approx(4.0, abs=1e-6)


def test_named_objectives_are_settings_of_the_family():
    batch = pair([1.0, 0.0, 0.5, 2.0, 1.0])
    family = {
        DPO(beta=0.3, label_smoothing=0.1): Pairwise(beta=0.3, label_smoothing=0.1),
        IPO(beta=0.3): DPO(beta=0.3, loss="ipo"),
        SimPO(beta=2.5, gamma=0.7): Pairwise(beta=2.5, margin=0.7, reference=False, aggregate="mean"),
        SePO(gamma=2.5, normaliser="length"): Pairwise(beta=2.5, reference=False, aggregate="length"),
    }
    for named, general in family.items():
        one, other = (item(double(*LOGP), batch) for item in (named, general))
        assert one.loss.item() == pytest.approx(other.loss.item(), abs=1e-12)
        assert one.metrics == other.metrics


@pytest.mark.parametrize(
    ("objective", "other"),
    [
        (TDPO(profile="official"), TDPO(version=1)),
        (TDPO(beta=0.2, alpha=0.0), DPO(beta=0.2)),
        (SparsePO(masks="weights"), TDPO(version=1)),
        (SePO(profile="official"), SePO(gamma=1.0)),
    ],
    ids=repr,
)
def test_methods_that_are_equal(objective, other):
    assert loss_of(objective) == pytest.approx(loss_of(other), abs=1e-12)


def test_a_constant_token_reward_of_tgdpo_rescales_beta():
    """Weights 1 + alpha r of the chosen and 1 - alpha r of the rejected response, r constant and of opposite sign."""
    assert loss_of(DPO(beta=0.1), pair([1 + 0.5 * 0.4] * 5)) == pytest.approx(
        loss_of(DPO(beta=0.12)), abs=1e-8
    )


def test_gradients_by_hand():
    # TDPO2: the chosen response's divergence has no gradient; the rejected one's is -sigma(-0.23) x 0.2 x -0.5 each.
    _, kl = slopes_of(TDPO(beta=0.2))
    assert kl.tolist() == pytest.approx([0.0, 0.0, *[0.1 / (1 + math.exp(0.23))] * 3], abs=1e-9)
    _, kl = slopes_of(TDPO(beta=0.2, version=1))
    both = 0.2 / (1 + math.exp(0.16))
    assert kl.tolist() == pytest.approx([-both, -both, both, both, both])
    # Both have one in the term of TIS-DPO, and in MaPO.
    _, kl = slopes_of(TIS, pair([0.7, 1.3, 1.3, 1.0, 0.7]))
    assert kl[0].item() == pytest.approx(0.1 * 0.5 * 0.7 / (1 + math.exp(0.1325)), abs=1e-7)
    _, kl = slopes_of(SparsePO(beta=0.2, masks="weights"), pair([1.0, 0.5, 0.0, 1.0, 0.2]))
    assert kl[0].item() == pytest.approx(-0.2 / (1 + math.exp(0.32)), abs=1e-7)
    assert slopes_of(KTO())[1] is None
    difference = TokenKL(sides="difference", weighted=False, stop_gradient="chosen")
    assert slopes_of(difference, pair([1.0, -2.0, 0.0, 0.5, 1.0]))[1].tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]
    # T-REG: the pair's weight s is a number, or its gradient ds/dlogp is -s (1 - s) 0.2 on the chosen side.
    signs = [0.2, -0.1, 0.3, 0.0, 0.4]
    slope, _ = slopes_of(TReg(beta=0.2), pair(signs))
    assert slope.tolist() == pytest.approx([-S * 0.2 * sign for sign in signs], abs=1e-7)
    moving, _ = slopes_of(TReg(beta=0.2, stop_gradient="none"), pair(signs))
    assert moving[0].item() == pytest.approx(slope[0].item() - S * (1 - S) * 0.2 * 0.26, abs=1e-7)
    # Nothing to learn from: no gradient.
    slope, _ = slopes_of(WeightedLikelihood(), pair([0.0, 0.0, 1.0, 1.0, 1.0]))
    assert slope.tolist() == [0.0] * 5


# Positions: (0.5, 1) and (0.5, -1); the rejected response's third token has no partner.
@pytest.mark.parametrize(
    ("baseline", "margins"),
    [
        # Baselines KL_l - KL_w = 0.1, 0.1.
        ("kl", (-0.6, 1.4)),
        ("none", (-0.5, 1.5)),
        # e^r - 1 - r: 0.1487213 at 0.5, 0.7182818 at 1, 0.3678794 at -1.
        ("sample", (-0.5 - 0.7182818 + 0.1487213, 1.5 - 0.3678794 + 0.1487213)),
    ],
)
def test_tbpo_by_hand(baseline, margins):
    log_ratios = [-0.2 * margin for margin in margins]
    # The default link is (R + log R) / 4.
    expected = sum(math.exp(value) + value for value in log_ratios) / 8
    assert loss_of(TBPO(beta=0.2, baseline=baseline)) == pytest.approx(expected, abs=1e-6)
    logistic = sum(softplus(value) for value in log_ratios) / 2
    assert loss_of(TBPO(beta=0.2, link="logistic", baseline=baseline)) == pytest.approx(logistic, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "baselines"),
    [
        # b_l - b_w = 3, -22; centred 12.5, -12.5; limited.
        ({"hidden": None}, (3.0, -22.0)),
        ({"hidden": None, "centre": True}, (12.5, -12.5)),
        ({"hidden": None, "clamp": 4.0}, (3.0, -4.0)),
        ({"profile": "official"}, (10.0, -10.0)),
    ],
)
def test_tbpo_with_its_head_by_hand(settings, baselines):
    objective = TBPO(beta=0.1, baseline="head", link="logistic", **settings)
    head = objective.make_module(2, 1).module
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0]]))
        head.bias.zero_()
    head.double()
    states = STATES.clone().requires_grad_()
    losses = objective(double(*LOGP), pair(states=states))
    margins = (0.1 * (-0.5 - baselines[0]), 0.1 * (1.5 - baselines[1]))
    assert losses.loss.item() == pytest.approx(sum(softplus(-margin) for margin in margins) / 2, abs=1e-9)
    # The head learns, unless both values are at the limit; the policy gets nothing through it.
    losses.loss.sum().backward()
    assert states.grad is None
    assert bool(head.weight.grad.any()) == ("profile" not in settings)


def test_the_head_of_tbpo():
    part = TBPO(baseline="head").make_module(6, 2)
    shapes = [tuple(weight.shape) for weight in part.module.parameters()]
    assert shapes == [(1024, 6), (1024,), (1, 1024), (1,)]
    assert (part.learning_rate, part.weight_decay) == (1e-3, 0.0)
    assert TBPO().make_module(6, 2) is None
    assert (TBPO().needs.kl, TBPO().needs.states) == ("forward", False)
    assert (TBPO(baseline="sample").needs.kl, TBPO(baseline="head").needs.states) == (None, True)


def test_tbpo_with_the_logistic_link_at_length_one_is_dpo():
    batch = flat_batch((1, 1), (1, 1), reference=[-1.0, -2.0, -0.5, -0.7])
    logp = double(-0.5, -2.5, -1.5, -0.1)
    tbpo = TBPO(baseline="none", link="logistic", beta=0.3)(logp, batch).loss
    torch.testing.assert_close(tbpo, DPO(beta=0.3)(logp, batch).loss, rtol=0, atol=1e-12)


def test_the_one_sample_divergence_is_unbiased():
    """Its mean over tokens of the reference is KL(reference || policy)."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 9, generator=generator, dtype=torch.float64).log_softmax(-1)
    exact = (reference.exp() * (reference - policy)).sum()
    estimate = (reference.exp() * one_sample_kl(policy - reference)).sum()
    torch.testing.assert_close(estimate, exact, rtol=0, atol=1e-14)
    slope = torch.autograd.functional.jacobian(one_sample_kl, torch.tensor([200.0, 0.0, -3.0]))
    assert slope.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "mixes", "ratio", "kl", "price"),
    [
        # One mask of 0.5: margin 0.75 - 0.35; 5 tokens x 0.5, each price halved: 2.5 x (0.1 + 0.2) / 2.
        ({}, [0.5], 0.5, 0.5, 0.375),
        # Masks 0.5 and 2: 2.5 x 0.1 + 10 x 0.2.
        ({"masks": "independent"}, [0.5, 2.0], 0.5, 2.0, 2.25),
        # A ReLU lets none through: only the price of nothing.
        ({}, [-1.0], 0.0, 0.0, 0.0),
        # The mask of the divergences is switched off: 5 x 0.5 x 0.1 / 2 and 5 x 0.2 / 2.
        ({"mask_kl": False}, [0.5], 0.5, 1.0, 0.625),
    ],
)
def test_sparsepo_by_hand(settings, mixes, ratio, kl, price):
    """Networks of two layers whose features are 1 and -1 after the norm, so that the mask is the first mixing weight."""
    objective = SparsePO(beta=0.2, l1_ratio=0.1, l1_kl=0.2, **settings)
    networks = objective.make_module(2, 2).module
    for network, mix in zip(networks, mixes, strict=True):
        with torch.no_grad():
            for layer in network.features:
                layer.weight.copy_(torch.tensor([[1.0, 0.0]]))
                layer.bias.zero_()
            network.mixer.weight.copy_(torch.tensor([[mix, 5.0]]))
    networks.double()
    losses = objective(double(*LOGP), pair(reference_layers=LAYERS))
    # The norm's epsilon keeps the feature a little below 1.
    margin = 0.2 * (ratio * 1.5 - kl * 0.7)
    assert losses.loss.item() == pytest.approx(softplus(-margin) + price, rel=1e-4)
    assert losses.metrics["masks/ratio"].item() == pytest.approx(ratio, rel=1e-4)
    assert losses.metrics["masks/kl"].item() == pytest.approx(kl, rel=1e-4)


def test_masks_start_alive():
    """Whatever the seed: a network whose masks are all 0 would never get a gradient."""
    layers = torch.randn(50, 3, 8, generator=torch.Generator().manual_seed(0))
    for seed in range(20):
        torch.manual_seed(seed)
        part = SparsePO().make_module(8, 3)
        assert (part.module[0](layers) > 0).float().mean() > 0.5
    assert (part.weight_decay, part.learning_rate) == (0.01, None)
    assert SparsePO(masks="weights").make_module(4, 2) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("chosen", "rejected"), [(-1e-12, -1e3), (0.0, 0.0), (-1e3, -1e-12), (-1e4, -1e4)])
def test_orpo_is_finite_at_both_ends(dtype, chosen, rejected):
    logp = torch.tensor([chosen, rejected], dtype=dtype, requires_grad=True)
    loss = ORPO()(logp, flat_batch((1, 1))).loss
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logp.grad.isfinite().all()
