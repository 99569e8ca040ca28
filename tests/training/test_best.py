"""The best weights in memory: what counts as better, what is put back, what a checkpoint holds."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.tiny import tiny_gpt2
from tokenward.training.callbacks import EarlyStop, KeepBest, save_trained, trained_weights


def module(value: float = 0.0) -> nn.Module:
    made = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    made[0].requires_grad_(False)
    return filled(made, value)


def filled(made: nn.Module, value: float) -> nn.Module:
    for parameter in made.parameters():
        parameter.data.fill_(value)
    return made


@pytest.mark.parametrize(("larger", "values"), [(True, [1.0, 3.0, 2.0]), (False, [3.0, 1.0, 2.0])])
def test_the_weights_of_the_best_value_are_put_back(larger, values):
    made = module(4.0)
    best = KeepBest(made, larger_is_better=larger, patience=None)
    best.restore()
    assert made[1].weight.tolist() == [[4.0, 4.0]], "nothing to put back yet"
    for step, value in enumerate(values):
        filled(made, 10.0 * step)
        assert best.update(value, step) is (step != 2)
    assert (best.value, best.step) == (values[1], 1)
    best.restore()
    assert made[1].weight.tolist() == [[10.0, 10.0]]
    assert made[0].weight.tolist() == [[20.0, 20.0]] * 2, "frozen weights are left alone"


def test_a_gain_below_a_ten_thousandth_of_the_best_does_not_count():
    best = KeepBest(module(), larger_is_better=True, patience=None)
    values = [-100.0, -99.991, -99.98, -99.98]
    assert [best.update(value, step) for step, value in enumerate(values)] == [True, False, True, False]
    zero = KeepBest(module(), larger_is_better=True, patience=None)
    assert zero.update(0.0, 0)
    assert zero.update(1e-9, 1), "a share of 0 is 0"


def test_patience_counts_evaluations_in_a_row():
    best = KeepBest(module(), larger_is_better=False, patience=2)
    found = []
    for step, value in enumerate([3.0, 4.0, 2.0, 2.0, 2.5, 1.0]):
        best.update(value, step)
        found.append((best.waited, best.exhausted))
    assert found == [(0, False), (1, False), (0, False), (1, False), (2, True), (0, False)]
    forever = KeepBest(module(), larger_is_better=False, patience=None)
    for step in range(50):
        forever.update(1.0, step)
    assert not forever.exhausted


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_never_the_best(odd):
    made = module(1.0)
    best = KeepBest(made, larger_is_better=True, patience=3)
    for step, value in enumerate([odd, -5.0, odd]):
        filled(made, step + 1.0)
        assert best.update(value, step) is (step == 1)
    assert (best.value, best.step, best.waited) == (-5.0, 1, 1)
    best.restore()
    assert made[1].weight.tolist() == [[2.0, 2.0]]


def test_a_checkpoint_holds_all_of_it(tmp_path):
    best = KeepBest(module(1.0), larger_is_better=True, patience=2)
    best.update(1.0, 3)
    best.update(0.5, 4)
    best.save(tmp_path / "best.safetensors")
    other = module(9.0)
    again = KeepBest(other, larger_is_better=True, patience=2)
    again.load(tmp_path / "best.safetensors", best.state())
    assert (again.value, again.step, again.waited) == (1.0, 3, 1)
    again.update(0.4, 5)
    assert again.exhausted
    again.restore()
    assert other[1].weight.tolist() == [[1.0, 1.0]]


def test_tied_weights_are_kept_once(tmp_path):
    """safetensors refuses two names for one memory."""
    model = tiny_gpt2()
    names = [name for name, _ in trained_weights(model)]
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names
    save_trained(model, tmp_path / "deep" / "model.safetensors")
    best = KeepBest(model, larger_is_better=True, patience=None)
    best.update(1.0, 0)
    best.save(tmp_path / "best.safetensors")
    before = model.lm_head.weight.clone()
    filled(model, 0.0)
    best.restore()
    assert torch.equal(model.lm_head.weight, before)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_early_stopping_follows_the_evaluation_loss():
    stop = EarlyStop(KeepBest(module(), larger_is_better=False, patience=1))
    control = SimpleNamespace(should_training_stop=False)
    stopped = []
    for step, loss in enumerate([2.0, 1.0, 1.5]):
        stop.on_evaluate(None, SimpleNamespace(global_step=step), control, metrics={"eval_loss": loss})
        stopped.append(control.should_training_stop)
    assert stopped == [False, False, True]
    assert (stop.best.value, stop.best.step) == (1.0, 1)
