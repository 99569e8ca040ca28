"""The gap and its two factors, first-of-equals predictions, and offsets that reach a prior."""

import math

import pytest
import torch

from tokenward.ops.classification import label_gap, piecewise_gap, predictions, prior_offsets


def test_the_gap_by_hand():
    probabilities = torch.tensor([[[0.7, 0.2, 0.1], [0.3, 0.1, 0.6]], [[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]])
    gap = label_gap(probabilities, torch.tensor([0, 1]))
    torch.testing.assert_close(gap, torch.tensor([[0.5, -0.5], [-0.3, -0.7]]))
    scaled = piecewise_gap(gap, correct=200.0, wrong=180.0)
    torch.testing.assert_close(scaled, torch.tensor([[100.0, -90.0], [-54.0, -126.0]]))


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_an_exact_tie_is_a_gap_of_zero_and_not_a_reward(classes):
    """The published code takes 1 + p there: its rival is the best class of another probability."""
    probabilities = torch.full((4, classes), 1 / classes)
    gap = label_gap(probabilities, torch.tensor([0, 1, 1, 0]))
    assert gap.tolist() == [0.0] * 4
    assert piecewise_gap(gap, correct=200.0, wrong=180.0).tolist() == [0.0] * 4
    # A tie at the top of three is one too, whatever the third has.
    assert label_gap(torch.tensor([[0.25, 0.375, 0.375]]), torch.tensor([2])).tolist() == [0.0]


def test_the_gap_lets_the_probabilities_as_they_were():
    probabilities = torch.tensor([[0.75, 0.25]])
    label_gap(probabilities, torch.tensor([1]))
    assert probabilities.tolist() == [[0.75, 0.25]]


def test_the_first_of_equal_classes_is_predicted():
    logp = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.25], [0.3, 0.3, 0.3]])
    assert predictions(logp).tolist() == [0, 1, 0]
    assert predictions(logp, torch.tensor([0.5, 0.5, 0.0])).tolist() == [0, 2, 2]


def test_offsets_of_two_texts_by_hand():
    """Log-odds of 1 and 3: sigma(2 - 1) and sigma(2 - 3) add up to 1, so the threshold is 2."""
    logp = torch.tensor([[0.0, 1.0], [0.0, 3.0]]).log_softmax(-1)
    offsets = prior_offsets(logp, torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(offsets, torch.tensor([-1.0, 1.0], dtype=torch.float64))
    assert predictions(logp).tolist() == [1, 1]
    assert predictions(logp, offsets).tolist() == [0, 1]


@pytest.mark.parametrize("prior", [[0.25] * 4, [0.1, 0.2, 0.3, 0.4]])
def test_the_mean_probabilities_become_the_prior(prior):
    torch.manual_seed(0)
    logp = (torch.randn(50, 4) * 2 + torch.tensor([6.0, 0.0, -3.0, 1.0])).log_softmax(-1)
    wanted = torch.tensor(prior, dtype=torch.float64)
    offsets = prior_offsets(logp, wanted)
    mean = (logp.double() - offsets).softmax(-1).mean(0)
    torch.testing.assert_close(mean, wanted, atol=1e-8, rtol=0)
    assert offsets.sum().item() == pytest.approx(0, abs=1e-9)
    # A constant bias of a class changes the offsets by itself, and so no prediction.
    biased = prior_offsets(logp + torch.tensor([0.0, 9.0, 0.0, 0.0]), wanted)
    assert (predictions(logp, offsets) == predictions(logp + torch.tensor([0, 9.0, 0, 0]), biased)).all()


def test_one_step_is_batch_calibration():
    logp = torch.tensor([[0.8, 0.2], [0.6, 0.4]]).log()
    offsets = prior_offsets(logp, torch.tensor([0.5, 0.5]), iterations=1)
    # Mean probabilities 0.7 and 0.3; their logarithms, less their mean.
    half = math.log(0.7 / 0.3) / 2
    torch.testing.assert_close(offsets, torch.tensor([half, -half], dtype=torch.float64), atol=1e-7, rtol=0)
