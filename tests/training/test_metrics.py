"""Means of what passes say of their comparisons."""

import pytest
import torch

from tokenward.objectives import Losses
from tokenward.training.metrics import LOSS, MetricSums


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
