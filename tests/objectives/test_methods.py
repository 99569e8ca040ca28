"""Each method against a number worked by hand from the paper's formula, and equalities between methods."""

import math
from dataclasses import replace

import pytest
import torch

from tests.objectives.test_objectives import LOGP, REFERENCE, batch_of, double
from tokenward.errors import UserError
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
    Sum,
    TokenKL,
    TReg,
    WeightedLikelihood,
)  # fmt: skip
from tokenward.ops.losses import one_sample_kl

# Log-ratios of LOGP to REFERENCE: 0.5, 0.5 | 1, -1, -0.5; sums 1 | -0.5.
KL = [0.1, 0.3, 0.2, 0.4, 0.5]  # sums 0.4 | 1.1


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def pair(weights=None, kl=KL, scores=None, **statistics):
    batch = batch_of((2, 3), weights=weights, reference=REFERENCE)
    scores = None if scores is None else torch.tensor(scores, dtype=torch.float64)
    if kl is not None:
        statistics["kl"] = torch.tensor(kl, dtype=torch.float64)
    return replace(batch, scores=scores, statistics=statistics)


def loss_of(objective, batch=None, logp=LOGP) -> float:
    return objective(double(*logp), pair() if batch is None else batch).loss.item()


def slope_of(objective, batch, logp=LOGP):
    """Gradients of the loss by log-probabilities and divergences."""
    values, kl = double(*logp), batch.statistics["kl"].clone().requires_grad_()
    loss = objective(values, replace(batch, statistics={"kl": kl})).loss.sum()
    return torch.autograd.grad(loss, [values, kl], allow_unused=True)


def test_tdpo_2_by_hand():
    # 0.2 (1.5 - 0.5 x 0.7) = 0.23; the chosen response's divergence has no gradient, the rejected one's
    # -sigma(-0.23) x 0.2 x -0.5 each.
    objective = TDPO(beta=0.2)
    assert loss_of(objective) == pytest.approx(softplus(-0.23), abs=1e-9)
    _, kl = slope_of(objective, pair())
    assert kl.tolist() == pytest.approx([0.0, 0.0, *[0.1 / (1 + math.exp(0.23))] * 3], abs=1e-9)
    _, kl = slope_of(TDPO(beta=0.2, version=1), pair())
    assert kl.tolist() == pytest.approx(
        [*[-0.2 / (1 + math.exp(0.16))] * 2, *[0.2 / (1 + math.exp(0.16))] * 3]
    )


def test_the_official_profile_of_tdpo_is_version_1():
    assert loss_of(TDPO(profile="official")) == loss_of(TDPO(version=1)) != loss_of(TDPO())


def test_tdpo_without_alpha_is_dpo():
    assert loss_of(TDPO(beta=0.2, alpha=0.0)) == loss_of(DPO(beta=0.2))


def test_the_term_of_tis_dpo_by_hand():
    # Weights 0.7, 1.3 | 1.3, 1, 0.7: ratios 0.35 + 0.65 = 1 and 1.3 - 1 - 0.35 = -0.05; divergences 0.07 + 0.39 = 0.46
    # and 0.26 + 0.4 + 0.35 = 1.01;  0.1 (1.05 - 0.5 (0.46 - 1.01)) = 0.1325, both with gradient.
    weighted = pair(weights=[0.7, 1.3, 1.3, 1.0, 0.7])
    objective = TDPO(alpha=-0.5, direction="reverse", stop_gradient="none")
    assert objective.needs.kl == "reverse"
    assert loss_of(objective, weighted) == pytest.approx(softplus(-0.1325), abs=1e-7)
    _, kl = slope_of(objective, weighted)
    assert kl[0].item() == pytest.approx(0.1 * 0.5 * 0.7 / (1 + math.exp(0.1325)), abs=1e-7)
    # A divergence counts by the size of the weight: the sign turns the ratio alone, -0.35 + 0.65 = 0.3.
    turned = pair(weights=[-0.7, 1.3, 1.3, 1.0, 0.7])
    assert loss_of(objective, turned) == pytest.approx(softplus(-0.1 * (0.35 + 0.5 * 0.55)), abs=1e-7)


# Positions: (0.5, 1) and (0.5, -1); the rejected response's third token has no partner.
@pytest.mark.parametrize(
    ("settings", "margins"),
    [
        # Baselines KL_l - KL_w = 0.1, 0.1.
        ({"baseline": "kl"}, (-0.6, 1.4)),
        ({"baseline": "none"}, (-0.5, 1.5)),
        # e^r - 1 - r: 0.1487213 at 0.5, 0.7182818 at 1, 0.3678794 at -1.
        ({"baseline": "sample"}, (-0.5 - 0.7182818 + 0.1487213, 1.5 - 0.3678794 + 0.1487213)),
    ],
)
def test_tbpo_by_hand(settings, margins):
    log_ratios = [-0.2 * margin for margin in margins]
    # The default link is (R + log R) / 4.
    expected = sum(math.exp(value) + value for value in log_ratios) / 8
    assert loss_of(TBPO(beta=0.2, **settings)) == pytest.approx(expected, abs=1e-6)
    logistic = sum(softplus(value) for value in log_ratios) / 2
    assert loss_of(TBPO(beta=0.2, link="logistic", **settings)) == pytest.approx(logistic, abs=1e-6)


def linear_head(objective, weight: float = 1.0):
    """The head of variant Q, with one weight of the first state and no bias."""
    part = objective.make_module(2, 1)
    with torch.no_grad():
        part.module.weight.copy_(torch.tensor([[weight, 0.0]]))
        part.module.bias.zero_()
    return part.module.double()


STATES = torch.tensor([[1.0, 9], [2, 9], [4, 9], [-20, 9], [7, 9]], dtype=torch.float64)


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
    linear_head(objective)
    states = STATES.clone().requires_grad_()
    losses = objective(double(*LOGP), pair(states=states))
    margins = (0.1 * (-0.5 - baselines[0]), 0.1 * (1.5 - baselines[1]))
    assert losses.loss.item() == pytest.approx(sum(softplus(-margin) for margin in margins) / 2, abs=1e-9)
    # The head learns, the policy gets nothing through it.
    losses.loss.sum().backward()
    assert states.grad is None
    assert bool(objective._head.weight.grad.any()) == (
        "profile" not in settings
    )  # there both are at the limit


def test_the_head_of_tbpo_is_one_hidden_layer_with_a_learning_rate_of_its_own():
    part = TBPO(baseline="head").make_module(6, 2)
    assert [tuple(weight.shape) for weight in part.module.parameters()] == [
        (1024, 6),
        (1024,),
        (1, 1024),
        (1,),
    ]
    assert (part.learning_rate, part.weight_decay) == (1e-3, 0.0)
    assert TBPO().make_module(6, 2) is None
    assert (TBPO().needs.kl, TBPO().needs.states) == ("forward", False)
    assert (TBPO(baseline="sample").needs.kl, TBPO(baseline="head").needs.states) == (None, True)


def test_tbpo_with_the_logistic_link_at_length_one_is_dpo():
    batch = batch_of((1, 1), (1, 1), reference=[-1.0, -2.0, -0.5, -0.7])
    logp = double(-0.5, -2.5, -1.5, -0.1)
    tbpo = TBPO(baseline="none", link="logistic", beta=0.3)(logp, batch).loss
    torch.testing.assert_close(tbpo, DPO(beta=0.3)(logp, batch).loss, rtol=0, atol=1e-12)


def test_the_one_sample_divergence_is_right_on_average():
    """Over tokens of the reference it is KL(reference || policy)."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 9, generator=generator, dtype=torch.float64).log_softmax(-1)
    exact = (reference.exp() * (reference - policy)).sum()
    estimate = (reference.exp() * one_sample_kl(policy - reference)).sum()
    torch.testing.assert_close(estimate, exact, rtol=0, atol=1e-14)
    slope = torch.autograd.functional.jacobian(one_sample_kl, torch.tensor([200.0, 0.0, -3.0]))
    assert slope.isfinite().all()


def test_mapo_by_hand():
    # Weights as masks 1, 0.5 | 0, 1, 0.2: u 0.75 and -1.1; divergences 0.25 and 0.5;  0.2 (1.85 - 0.25) = 0.32
    batch = pair(weights=[1.0, 0.5, 0.0, 1.0, 0.2])
    objective = SparsePO(beta=0.2, masks="weights")
    assert loss_of(objective, batch) == pytest.approx(softplus(-0.32), abs=1e-7)
    assert objective.make_module(4, 2) is None
    assert objective.needs.reference_layers is False
    # No gradient is stopped.
    _, kl = slope_of(objective, batch)
    assert kl[0].item() == pytest.approx(-0.2 / (1 + math.exp(0.32)), abs=1e-7)


def test_mapo_with_weights_of_one_is_tdpo_1():
    assert loss_of(SparsePO(masks="weights")) == pytest.approx(loss_of(TDPO(version=1)), abs=1e-12)


def known_masks(objective, mixes):
    """Networks of two layers whose features are 1 and -1 after the norm, so that the mask is the first mixing weight."""
    part = objective.make_module(2, 2)
    for network, mix in zip(part.module, mixes, strict=True):
        with torch.no_grad():
            for layer in network.features:
                layer.weight.copy_(torch.tensor([[1.0, 0.0]]))
                layer.bias.zero_()
            network.mixer.weight.copy_(torch.tensor([[mix, 5.0]]))
    part.module.double()
    return part


LAYERS = torch.tensor([[[3.0, 1.0], [1.0, 3.0]]], dtype=torch.float64).expand(5, 2, 2)


@pytest.mark.parametrize(
    ("masks", "mixes", "ratio", "kl", "price"),
    [
        # One mask of 0.5: margin 0.75 - 0.35; 5 tokens x 0.5, each price halved: 2.5 x (0.1 + 0.2) / 2.
        ("common", [0.5], 0.5, 0.5, 0.375),
        # Masks 0.5 and 2: 2.5 x 0.1 + 10 x 0.2.
        ("independent", [0.5, 2.0], 0.5, 2.0, 2.25),
        # A ReLU lets none through: only the price of nothing.
        ("common", [-1.0], 0.0, 0.0, 0.0),
    ],
)
def test_sparsepo_by_hand(masks, mixes, ratio, kl, price):
    objective = SparsePO(beta=0.2, masks=masks, l1_ratio=0.1, l1_kl=0.2)
    known_masks(objective, mixes)
    margin = 0.2 * (ratio * 1.5 - kl * 0.7)
    losses = objective(double(*LOGP), pair(reference_layers=LAYERS))
    # The norm's epsilon keeps the feature a little below 1.
    assert losses.loss.item() == pytest.approx(softplus(-margin) + price, rel=1e-4)
    assert losses.metrics["masks/ratio"].item() == pytest.approx(ratio, rel=1e-4)
    assert losses.metrics["masks/kl"].item() == pytest.approx(kl, rel=1e-4)


def test_a_switch_leaves_a_mask_out():
    objective = SparsePO(beta=0.2, mask_kl=False)
    known_masks(objective, [0.5])
    found = loss_of(objective, pair(reference_layers=LAYERS))
    assert found == pytest.approx(softplus(-0.2 * (0.75 - 0.7)), rel=1e-4)


def test_masks_begin_alive():
    """Whatever the seed: a network whose masks are all 0 would never get a gradient."""
    layers = torch.randn(50, 3, 8, generator=torch.Generator().manual_seed(0))
    for seed in range(20):
        torch.manual_seed(seed)
        part = SparsePO().make_module(8, 3)
        assert (part.module[0](layers) > 0).float().mean() > 0.5
    assert (part.weight_decay, part.learning_rate) == (0.01, None)
    assert len(SparsePO(masks="independent").make_module(8, 3).module) == 2


def test_kto_by_hand():
    # z = (0.4 + 1.1) / 2 = 0.75; 1 - sigma(0.2 x 0.25), 1 - sigma(0.2 x 1.25); their mean, the second twice.
    expected = (1 / (1 + math.exp(0.05)) + 2 / (1 + math.exp(0.25))) / 2
    losses = KTO(beta=0.2, undesirable=2.0)(double(*LOGP), pair())
    assert losses.loss.item() == pytest.approx(expected, abs=1e-7)
    assert losses.metrics["kl"].item() == pytest.approx(0.75)
    assert slope_of(KTO(), pair())[1] is None
    # Without the reference point: 1 - sigma(0.2), 1 - sigma(0.1).
    plain = KTO(beta=0.2, anchor="zero")
    assert loss_of(plain) == pytest.approx((1 / (1 + math.exp(0.2)) + 1 / (1 + math.exp(0.1))) / 2, abs=1e-7)
    assert (KTO().needs.kl, plain.needs.kl) == ("reverse", None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("chosen", "rejected"), [(-1e-12, -1e3), (0.0, 0.0), (-1e3, -1e-12), (-1e4, -1e4)])
def test_orpo_is_finite_at_both_ends(dtype, chosen, rejected):
    logp = torch.tensor([chosen, rejected], dtype=dtype, requires_grad=True)
    loss = ORPO()(logp, batch_of((1, 1))).loss
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logp.grad.isfinite().all()


def test_treg_by_hand():
    # Token rewards 0.2, -0.1 | 0.3, 0, 0.4, the fourth of exactly 0 counts nowhere. Rewards of the tokens with
    # weight, 0.2 x 1 and 0.2 x (1 - 0.5): s = sigma(0.1 - 0.2);
    # -s 0.2 (0.2 x -1 + 0.1 x 2 + 0.3 x -1 + 0.4 x -2.5) = s 0.2 x 1.3
    batch = pair(weights=[0.2, -0.1, 0.3, 0.0, 0.4])
    weight = 1 / (1 + math.exp(0.1))
    assert loss_of(TReg(beta=0.2), batch) == pytest.approx(weight * 0.26, abs=1e-7)
    slope, _ = slope_of(TReg(beta=0.2), batch)
    signs = [0.2, -0.1, 0.3, 0.0, 0.4]
    assert slope.tolist() == pytest.approx([-weight * 0.2 * sign for sign in signs], abs=1e-7)
    moving, _ = slope_of(TReg(beta=0.2, stop_gradient="none"), batch)
    # ds/dlogp is -s (1 - s) 0.2 on the chosen side.
    assert moving[0].item() == pytest.approx(slope[0].item() - weight * (1 - weight) * 0.2 * 0.26, abs=1e-7)


def test_token_kl_by_hand():
    batch = pair(weights=[1.0, -2.0, 0.0, 0.5, 1.0])
    # 0.1 + 2 x 0.3 = 0.7 and 0.2 + 0.5 = 0.7; unweighted 0.4 and 0.9.
    assert loss_of(TokenKL(), batch) == pytest.approx(1.4, abs=1e-7)
    assert loss_of(TokenKL(weighted=False), batch) == pytest.approx(1.3, abs=1e-7)
    difference = TokenKL(sides="difference", weighted=False, stop_gradient="chosen")
    assert loss_of(difference, batch) == pytest.approx(0.5, abs=1e-7)
    assert slope_of(difference, batch)[1].tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]
    assert (TokenKL().needs.pairwise, difference.needs.pairwise) == (False, True)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # u 1 and -0.5, z = 0.2 x 1.5 = 0.3.
        ({}, softplus(-0.3)),
        ({"margin": 0.1}, softplus(-0.2)),
        ({"link": "hinge"}, 0.7),
        ({"label_smoothing": 0.1}, 0.9 * softplus(-0.3) + 0.1 * softplus(0.3)),
        ({"link": "robust", "label_smoothing": 0.1}, (0.9 * softplus(-0.3) - 0.1 * softplus(0.3)) / 0.8),
        ({"link": "kliep"}, math.exp(-0.3) - 0.3),
        ({"link": "sba"}, (math.exp(-0.3) - 0.3) / 4),
        ({"link": "lsif"}, math.exp(-0.6) - 2 * math.exp(0.3)),
        # Means over tokens: 0.5 and -0.5 / 3.
        ({"link": "ipo", "aggregate": "mean"}, (0.5 + 0.5 / 3 - 2.5) ** 2),
        ({"reference": False, "aggregate": "length"}, softplus(-0.2 * (-1.5 + 2.5))),
    ],
)
def test_the_pairwise_family_by_hand(settings, expected):
    assert loss_of(Pairwise(beta=0.2, **settings)) == pytest.approx(expected, abs=1e-7)


def test_named_settings_of_the_family():
    batch = pair(weights=[1.0, 0.0, 0.5, 2.0, 1.0])
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


def test_decay_by_hand():
    # D2PO, 0.9^t from t = 1: 0.45 + 0.405 and 0.9 - 0.81 - 0.3645
    batch = pair(weights=[0.9, 0.81, 0.9, 0.81, 0.729])
    assert loss_of(DPO(beta=0.2), batch) == pytest.approx(softplus(-0.2 * (0.855 + 0.2745)), abs=1e-7)


def test_a_constant_token_reward_of_tgdpo_rescales_beta():
    """Weights 1 + alpha r of the chosen and 1 - alpha r of the rejected response, r constant and of opposite sign."""
    alpha, reward = 0.5, 0.4
    batch = pair(weights=[1 + alpha * reward] * 5)
    assert loss_of(DPO(beta=0.1), batch) == pytest.approx(loss_of(DPO(beta=0.12)), abs=1e-8)


def test_weights_of_tgdpo_may_be_negative():
    # Weights 1.5, -0.5 | -1, 1, 0.5: 0.5 and -1 - 1 - 0.25 = -2.25;  0.2 x 2.75
    batch = pair(weights=[1.5, -0.5, -1.0, 1.0, 0.5])
    assert loss_of(DPO(beta=0.2), batch) == pytest.approx(softplus(-0.55), abs=1e-7)


def test_likelihood_of_both_sides_and_signed_weights_by_hand():
    batch = pair(weights=[1.0, -0.5, 0.0, 2.0, -1.0])
    # Best: 1 x 1 - 0.5 x 2 = 0 over 1.5; both: 0 + 8 - 2.5 = 5.5 over 4.5, over 5 tokens, or whole.
    assert loss_of(WeightedLikelihood(), batch) == pytest.approx(0.0)
    assert loss_of(WeightedLikelihood(sides="both"), batch) == pytest.approx(5.5 / 4.5, abs=1e-7)
    assert loss_of(WeightedLikelihood(sides="both", normaliser="length"), batch) == pytest.approx(
        1.1, abs=1e-7
    )
    assert loss_of(WeightedLikelihood(sides="both", normaliser="none"), batch) == pytest.approx(5.5, abs=1e-7)


def test_likelihood_of_nothing_costs_nothing():
    logp = double(*LOGP)
    loss = WeightedLikelihood()(logp, pair(weights=[0.0, 0.0, 1.0, 1.0, 1.0])).loss
    loss.sum().backward()
    assert loss.tolist() == [0.0]
    assert logp.grad.tolist() == [0.0] * 5


# Chosen tokens above 0, rejected ones below.
SPEAKING = {"name": "threshold", "above": 0.0, "below": 0.0}


def test_a_sum_is_the_weighted_sum_of_its_terms():
    terms = [
        {"name": "dpo", "beta": 0.2},
        {"name": "treg", "beta": 0.2, "factor": 0.25, "selection": SPEAKING},
    ]
    batch = pair(scores=[0.2, -0.1, -0.3, 0.1, -0.4])
    losses = Sum(terms=terms)(double(*LOGP), batch)
    picked = pair(weights=[1.0, 0.0, 1.0, 0.0, 1.0])
    parts = [loss_of(DPO(beta=0.2)), loss_of(TReg(beta=0.2), picked)]
    assert losses.loss.item() == pytest.approx(parts[0] + 0.25 * parts[1], abs=1e-9)
    assert losses.metrics["loss/dpo"].item() == pytest.approx(parts[0])
    assert losses.metrics["loss/treg"].item() == pytest.approx(parts[1])
    # The first term's view of what both show.
    assert losses.metrics["rewards/chosen"].item() == pytest.approx(0.2)
    assert losses.metrics["selection/empty"].tolist() == [0.0]


def test_a_sum_of_one_keeps_the_denominator_of_its_term():
    whole = Sum(terms=[{"name": "weighted_likelihood", "normaliser": "step_length", "factor": 0.5}])
    found = whole(double(*LOGP), pair())
    assert whole.needs.own_denominator
    # Half of the chosen response's 1 + 2, and its two tokens.
    assert (found.loss.tolist(), found.denominator.tolist()) == ([1.5], [2.0])


@pytest.mark.parametrize(
    ("kind", "settings", "word"),
    [
        (TDPO, {"beta": 0.0}, "beta"),
        (TDPO, {"version": 1, "alpha": 0.3}, "version: 2"),
        (TDPO, {"profile": "official", "version": 2}, "profile: official"),
        (TBPO, {"profile": "official"}, "baseline: head"),
        (TBPO, {"power": -1.0}, "power"),
        (SparsePO, {"l1_kl": -0.1}, "l1_kl"),
        (KTO, {"desirable": 0.0, "undesirable": 0.0}, "not both 0"),
        (Pairwise, {"link": "odds"}, "reference: false"),
        (Pairwise, {"link": "ipo", "margin": 0.1}, "margin"),
        (Pairwise, {"label_smoothing": 0.5}, "label_smoothing"),
        (TokenKL, {"stop_gradient": "chosen"}, "sides: difference"),
        (ORPO, {"beta": -1.0}, "beta"),
        (IPO, {"beta": 0.0}, "beta"),
        (TReg, {"beta": 0.0}, "beta"),
        (Sum, {"terms": []}, "needs terms"),
        (Sum, {"terms": [{"factor": 2.0}]}, "term 1"),
        (Sum, {"terms": [{"name": "dpo", "factor": "much"}]}, "factor"),
        (Sum, {"terms": [{"name": "dpo", "selection": "all"}]}, "'all'"),
        (Sum, {"terms": [{"name": "dppo"}]}, "'dpo'"),
        (Sum, {"terms": [{"name": "dpo"}, {"name": "sft", "normaliser": "step_weights"}]}, "one denominator"),
    ],
)
def test_values_that_cannot_work_are_refused(kind, settings, word):
    with pytest.raises(UserError, match=word):
        kind(**settings)


def test_a_control_selection_in_a_term_draws_the_same_every_time():
    terms = [{"name": "sepo", "selection": {"name": "top_fraction", "ties": "random"}}]
    batch = pair(scores=[0.0] * 5)
    assert len({loss_of(Sum(terms=terms), batch) for _ in range(3)}) == 1
