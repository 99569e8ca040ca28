"""Formulas of the losses: hand-worked values, symmetries, and TRL's own functions."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tokenward.ops.losses import dpo, ipo, kto, margin_logistic, one_sample_kl

CHOSEN = torch.tensor([-1.5, 0.25, 3.0, -0.5], dtype=torch.float64)
REJECTED = torch.tensor([-1.0, 0.75, -2.0, -0.5], dtype=torch.float64)


def number(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


def test_values_by_hand():
    # beta (chosen - rejected) = 0.5 (3 - 1) = 1;  -log sigma(1) = log(1 + e^-1) = log 1.3678794 = 0.3132617
    one, other = number(3.0), number(1.0)
    assert dpo(one, other, beta=0.5).item() == pytest.approx(0.3132617, abs=1e-7)
    # -log sigma(1) = 0.3132617, -log sigma(-1) = 1.3132617;  0.9 x 0.3132617 + 0.1 x 1.3132617 = 0.4132617
    assert dpo(one, other, beta=0.5, label_smoothing=0.1).item() == pytest.approx(0.4132617, abs=1e-7)
    # (1 - 0.5 - 1 / (2 x 0.25))^2 = (0.5 - 2)^2 = 2.25
    assert ipo(number(1.0), number(0.5), beta=0.25).item() == 2.25
    # 2 (-1 - -1.5) - 2 = -1;  -log sigma(-1) = 1 + log(1 + e^-1) = 1.3132617
    loss = margin_logistic(number(-1.0), number(-1.5), scale=2.0, margin=2.0)
    assert loss.item() == pytest.approx(1.3132617, abs=1e-7)
    # 1 - sigma(2 (1 - 0.5)) = 0.2689414 for a desirable response, 1 - sigma(-1) for another one
    found = kto(torch.ones(2, dtype=torch.float64), torch.tensor([True, False]), number(0.5), beta=2.0)
    assert found.tolist() == pytest.approx([0.2689414, 0.7310586], abs=1e-7)
    # 2 - 1 - log 2
    found = one_sample_kl(torch.tensor([0.0, math.log(2)]))
    assert found.tolist() == pytest.approx([0.0, 0.3068528], abs=1e-7)


LOGISTIC = [lambda c, r: dpo(c, r, beta=0.7), lambda c, r: margin_logistic(c, r, scale=0.7)]


@pytest.mark.parametrize("loss", LOGISTIC)
def test_logistic_losses(loss):
    """log 2 for equal sides; swapping the sides negates the logit: -log sigma(-z) + log sigma(z) = z."""
    assert loss(CHOSEN, CHOSEN).tolist() == pytest.approx([math.log(2)] * 4)
    difference = loss(REJECTED, CHOSEN) - loss(CHOSEN, REJECTED)
    torch.testing.assert_close(difference, 0.7 * (CHOSEN - REJECTED), rtol=0, atol=1e-15)


def test_swapping_the_sides_of_smoothing_and_of_ipo():
    swapped = dpo(REJECTED, CHOSEN, beta=0.7, label_smoothing=0.8)
    found = dpo(CHOSEN, REJECTED, beta=0.7, label_smoothing=0.2)
    torch.testing.assert_close(found, swapped, rtol=0, atol=1e-15)
    # (d - t)^2 - (-d - t)^2 = -4 d t with t = 1 / (2 beta) = 2
    difference = ipo(CHOSEN, REJECTED, beta=0.25) - ipo(REJECTED, CHOSEN, beta=0.25)
    torch.testing.assert_close(difference, -8 * (CHOSEN - REJECTED), rtol=0, atol=1e-13)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_smoothed_loss_is_minimal_at_the_label_probability(smoothing):
    # The derivative by z is (1 - e) sigma(z) - (1 - e) + e sigma(z) = sigma(z) - (1 - e).
    chosen = CHOSEN.clone().requires_grad_()
    dpo(chosen, REJECTED, beta=1.0, label_smoothing=smoothing).sum().backward()
    expected = (CHOSEN - REJECTED).sigmoid() - (1 - smoothing)
    torch.testing.assert_close(chosen.grad, expected, rtol=0, atol=1e-15)


OURS = {
    "sigmoid": ({}, lambda c, r: dpo(c, r, beta=0.3)),
    "sigmoid, smoothed": ({"label_smoothing": 0.1}, lambda c, r: dpo(c, r, beta=0.3, label_smoothing=0.1)),
    "ipo": ({}, lambda c, r: ipo(c, r, beta=0.3)),
    "simpo": ({"simpo_gamma": 0.5}, lambda c, r: margin_logistic(c, r, scale=0.3, margin=0.5)),
}


@pytest.mark.parametrize("name", OURS)
def test_gradients_match_finite_differences(name):
    sides = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    assert torch.autograd.gradcheck(OURS[name][1], sides)


@pytest.mark.parametrize("name", OURS)
def test_losses_equal_those_of_trl(name, monkeypatch):
    settings, ours = OURS[name]
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    options = {"label_smoothing": 0.0, "simpo_gamma": 0.0, "beta": 0.3, "alpha": 0.0, **settings}
    its_self = SimpleNamespace(
        loss_type=name.split(",")[0], accelerator=SimpleNamespace(device="cpu"), **options
    )
    losses, _, _ = trainer.cpo_loss(its_self, CHOSEN, REJECTED)
    torch.testing.assert_close(ours(CHOSEN, REJECTED), losses, rtol=0, atol=1e-14)


@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_huge_gaps_stay_finite_and_exact(gap):
    chosen = torch.tensor([gap], requires_grad=True)
    loss = margin_logistic(chosen, torch.zeros(1), scale=1.0, margin=1.0)
    loss.backward()
    assert loss.item() == max(0.0, 1.0 - gap)
    assert chosen.grad.tolist() == [0.0 if gap > 0 else -1.0]


def test_margin_is_not_scaled():
    # Both common forms of SimPO: beta d - gamma, and beta (d - gamma / beta).
    written_out = -F.logsigmoid(2.5 * (CHOSEN - REJECTED - 0.4 / 2.5))
    found = margin_logistic(CHOSEN, REJECTED, scale=2.5, margin=0.4)
    torch.testing.assert_close(found, written_out, rtol=0, atol=1e-14)
