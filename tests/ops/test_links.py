"""Link functions: the Bregman identity of each generator, limits and slopes."""

import math

import pytest
import torch

from tokenward.objectives.pairwise import Link
from tokenward.ops import links

R = torch.tensor([0.1, 0.5, 0.9, 1.0, 1.3, 2.0, 7.0], dtype=torch.float64)

GENERATORS = {
    "logistic": (lambda r: (r * r.log() - (1 + r) * (1 + r).log()) / 2, links.logistic),
    "kliep": (lambda r: r * r.log() - r, links.kliep),
    "lsif": (lambda r: (r - 1).square(), links.lsif),
    "ba": (lambda r: (r**1.5 - r) / 0.5, lambda z: links.basu(z, 0.5)),
    "sba": (lambda r: (r**1.5 - r) / 0.5 / (4 * 1.5), lambda z: links.scaled_basu(z, 0.5, 4.0)),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_bregman_link_is_the_identity_of_its_generator(name):
    """h'(R) R - h(R) - h'(1/R), up to a constant."""
    generator, link = GENERATORS[name]

    def slope(point):
        point = point.detach().requires_grad_()
        return torch.autograd.grad(generator(point).sum(), point)[0]

    identity = slope(R) * R - generator(R) - slope(1 / R)
    found = link(-R.log())
    torch.testing.assert_close(found - found[3], identity - identity[3], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["logistic", "hinge", "robust", "kliep", "lsif", "ba", "sba"])
def test_every_link_decreases_at_zero_and_is_finite_at_both_ends(name):
    settings = {"label_smoothing": 0.1 if name == "robust" else 0.0, "power": 0.5 if "ba" in name else 0.0}
    z = torch.tensor([0.0, -1e4, 1e4, -40.0, 40.0], requires_grad=True)
    loss = Link(name=name, **settings)(z)
    (slope,) = torch.autograd.grad(loss.sum(), z)
    assert loss.isfinite().all()
    assert slope.isfinite().all()
    assert slope[0] < 0


def test_power_zero_is_kliep_and_the_scaled_slope_does_not_depend_on_the_power():
    z = torch.linspace(-3, 3, 13, dtype=torch.float64)
    for link in (links.basu, lambda z, power: links.scaled_basu(z, power, 1.0)):
        torch.testing.assert_close(link(z, 0.0), links.kliep(z), rtol=0, atol=1e-14)
        torch.testing.assert_close(link(z, 1e-7), links.kliep(z), rtol=1e-5, atol=1e-5)
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    for power in (0.0, 0.5, 2.0):
        (slope,) = torch.autograd.grad(links.scaled_basu(zero, power, 4.0).sum(), zero)
        assert slope.item() == pytest.approx(-0.5)


def test_hinge_and_smoothing_by_hand():
    assert links.hinge(torch.tensor([-1.0, 0.25, 1.0, 3.0])).tolist() == [2.0, 0.75, 0.0, 0.0]
    z = torch.tensor([0.3])
    expected = 0.9 * links.kliep(z) + 0.1 * links.kliep(-z)
    assert Link(name="kliep", label_smoothing=0.1)(z).item() == pytest.approx(expected.item())


def test_robust_link_is_unbiased_under_flipped_labels():
    z = torch.tensor([-1.0, 0.2, 3.0], dtype=torch.float64)
    mean = 0.8 * links.robust(z, 0.2) + 0.2 * links.robust(-z, 0.2)
    torch.testing.assert_close(mean, links.logistic(z), rtol=0, atol=1e-14)


def test_log1mexp_is_accurate_at_both_ends():
    assert links.log1mexp(torch.tensor(-1e-10)).item() == pytest.approx(math.log(1e-10), rel=1e-6)
    assert links.log1mexp(torch.tensor(-40.0)).item() == pytest.approx(-math.exp(-40.0), rel=1e-6)
    x = torch.tensor([-5.0, -1.0, -0.7, -0.6, -0.1], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(links.log1mexp(x), torch.log(1 - torch.exp(x)), rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(links.log1mexp, x)
    ends = torch.tensor([-1e-30, -1e30], requires_grad=True)
    (slope,) = torch.autograd.grad(links.log_odds(ends).sum(), ends)
    assert slope.tolist() == [0.0, 1.0]
