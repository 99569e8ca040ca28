"""Means of what passes say of their comparisons."""

import pytest
import torch

from tokenward.objectives import Losses
from tokenward.training.metrics import LOSS, MetricSums, flat_loss_warning


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def test_a_metric_that_some_comparisons_lack_is_a_mean_over_the_others():
    sums = MetricSums()
    loss, all_count = tensor(1.0, 3.0), torch.ones(2, dtype=torch.bool)
    metrics = {"good": tensor(4.0, 9.0), "bad": tensor(9.0, 2.0), "kl": tensor(1.0, 2.0)}
    having = {"good": tensor(1.0, 0.0), "bad": tensor(0.0, 1.0)}
    sums.add(Losses(loss, metrics, having=having), all_count)
    sums.add(Losses(loss, metrics, having={**having, "good": tensor(1.0, 1.0)}), tensor(0.0, 1.0) != 0)
    # good: 4 of the first pass, 9 of the second, whose first comparison does not count; bad: 2 twice.
    found = sums.take(lambda total: total)
    assert found == pytest.approx({LOSS: 7 / 3, "good": 6.5, "bad": 2.0, "kl": 5 / 3})
    sums.add(Losses(loss, metrics, having={"bad": tensor(0.0, 0.0)}), all_count)
    assert "bad" not in sums.take(lambda total: total)


@pytest.mark.parametrize(
    ("losses", "warns"),
    [
        ((0.6931, 0.6930, 0.6929, 0.6926), True),
        ((0.6931, 0.69, 0.68, 0.67), False),
        ((0.6931, 0.6931), False),
    ],
)
def test_a_training_that_learned_nothing_is_said(losses: tuple[float, ...], warns: bool) -> None:
    history = [{"loss": loss, "rewards/accuracies": 0.5} for loss in losses]
    found = flat_loss_warning(history, 1e-6, "oracle.training")
    assert ("0.6931 to 0.6926" in found and "oracle.training.learning_rate (1e-06)" in found) == warns
    assert not flat_loss_warning([{"loss": loss} for loss in losses], 1e-6, "policy.training")
