"""Losses that are not finite, on a device that one waits for."""

import pytest
import torch

from tokenward.errors import UserError
from tokenward.training.checks import FiniteLosses


class Elsewhere:
    """Losses that lie on another device: to look at them is counted."""

    def __init__(self, values):
        self.values, self.device, self.looks = torch.tensor(values), torch.device("cuda"), 0

    def detach(self):
        return self

    def isfinite(self):
        self.looks += 1
        return self.values.isfinite()

    def tolist(self):
        return self.values.tolist()


def test_nobody_waits_for_a_device_until_there_is_a_reason():
    good, bad = Elsewhere([1.0, 2.0]), Elsewhere([1.0, float("nan")])
    losses = FiniteLosses()
    losses.note(good, ["a:1", "a:2"], 1)
    losses.note(bad, ["a:3", "a:4"], 2)
    assert good.looks == bad.looks == 0
    with pytest.raises(UserError, match=r"not finite at step 2, for: a:4\."):
        losses.check()
    losses.check()  # what was seen is gone
    assert good.looks == 1


def test_on_the_cpu_a_loss_is_looked_at_once():
    with pytest.raises(UserError, match=r"not finite at step 7, for: b:1\."):
        FiniteLosses().note(torch.tensor([float("inf"), 0.0]), ["b:1", "b:2"], 7)
