"""Label gap, predictions, and offsets that reach a prior."""

import math

import pytest
import torch

from tokenward.ops.classification import label_gap, piecewise_gap, predictions, prior_offsets


def test_gap_by_hand():
    probabilities = torch.tensor([[[0.7, 0.2, 0.1], [0.3, 0.1, 0.6]], [[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]])
    before = probabilities.clone()
    gap = label_gap(probabilities, torch.tensor([0, 1]))
    torch.testing.assert_close(gap, torch.tensor([[0.5, -0.5], [-0.3, -0.7]]))
    scaled = piecewise_gap(gap, correct=200.0, wrong=180.0)
    torch.testing.assert_close(scaled, torch.tensor([[100.0, -90.0], [-54.0, -126.0]]))
    assert torch.equal(probabilities, before), "the input is not modified"


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_exact_tie_has_gap_zero(classes):
    """The published code gives 1 + p: it compares with the best class of a different probability."""
    gap = label_gap(torch.full((4, classes), 1 / classes), torch.tensor([0, 1, 1, 0]))
    assert gap.tolist() == piecewise_gap(gap, correct=200.0, wrong=180.0).tolist() == [0.0] * 4
    assert label_gap(torch.tensor([[0.25, 0.375, 0.375]]), torch.tensor([2])).tolist() == [0.0]


def test_first_of_equal_classes_is_predicted():
    logp = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.25], [0.3, 0.3, 0.3]])
    assert predictions(logp).tolist() == [0, 1, 0]
    assert predictions(logp, torch.tensor([0.5, 0.5, 0.0])).tolist() == [0, 2, 2]


def test_offsets_by_hand():
    """Log-odds of 1 and 3: sigma(2 - 1) and sigma(2 - 3) sum to 1, so the threshold is 2."""
    logp = torch.tensor([[0.0, 1.0], [0.0, 3.0]]).log_softmax(-1)
    offsets = prior_offsets(logp, torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(offsets, torch.tensor([-1.0, 1.0], dtype=torch.float64))
    assert predictions(logp, offsets).tolist() == [0, 1]
    # One step is Batch Calibration: mean probabilities 0.7 and 0.3, their centered logarithms.
    logp = torch.tensor([[0.8, 0.2], [0.6, 0.4]]).log()
    half = math.log(0.7 / 0.3) / 2
    step = prior_offsets(logp, torch.tensor([0.5, 0.5]), iterations=1)
    torch.testing.assert_close(step, torch.tensor([half, -half], dtype=torch.float64), atol=1e-7, rtol=0)


@pytest.mark.parametrize("prior", [[0.25] * 4, [0.1, 0.2, 0.3, 0.4]])
def test_offsets_reach_the_prior(prior):
    torch.manual_seed(0)
    logp = (torch.randn(50, 4) * 2 + torch.tensor([6.0, 0.0, -3.0, 1.0])).log_softmax(-1)
    wanted = torch.tensor(prior, dtype=torch.float64)
    offsets = prior_offsets(logp, wanted)
    mean = (logp.double() - offsets).softmax(-1).mean(0)
    torch.testing.assert_close(mean, wanted, atol=1e-8, rtol=0)
    assert offsets.sum().item() == pytest.approx(0, abs=1e-9)
    # The offsets absorb a constant bias of a class, so the predictions stay.
    shifted = logp + torch.tensor([0.0, 9.0, 0.0, 0.0])
    assert torch.equal(predictions(logp, offsets), predictions(shifted, prior_offsets(shifted, wanted)))
