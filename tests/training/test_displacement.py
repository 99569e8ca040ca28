"""The alarm for chosen responses that training makes less likely."""

from pathlib import Path

import pytest

from tests.training.tools import arguments, language_model, token_row, with_reference
from tokenward.errors import UserError
from tokenward.objectives import DPO, SFT, SePO
from tokenward.training.metrics import CHANGE, LEVEL, Changes, DisplacementAlarm, displacement_facts
from tokenward.training.trainer import TokenTrainer

STEPS = 8


def rows(chosen: int, rejected: int):
    """Pairs of one repeated word: a sum over tokens is larger for the side that repeats it more often."""
    return [token_row([40 + i], ([70] * chosen, [70] * rejected), f"rows:{i}") for i in range(4)]


FALLING, RISING = rows(2, 8), rows(8, 2)
# Each with a learning rate at which its gradients do something; SePO's starts far from a margin of 0.
OBJECTIVES = {
    "dpo": (DPO(beta=0.05), 0.02),
    "sepo": (SePO(gamma=0.05, normaliser="none"), 0.5),
    "sft": (SFT(), 0.05),
}
PAIRWISE = ("dpo", "sepo")


def train(folder: Path, data, name: str, *, margin=0.5, resume: str | None = None, **settings):
    """Train; returns the warnings and what was logged."""
    model, warned = language_model(), []
    objective, rate = OBJECTIVES[name]
    settings = {"learning_rate": rate, "max_steps": STEPS, "per_device_train_batch_size": 4, **settings}
    made = arguments(folder, displacement_margin=margin, **settings)
    alarm = DisplacementAlarm(made.displacement_margin, "policy.training", warned.append)
    data = with_reference(model, data) if name == "dpo" else data
    trainer = TokenTrainer(model, objective, made, data, callbacks=[alarm])
    trainer.train(resume_from_checkpoint=None if resume is None else str(folder / resume))
    return warned, trainer.state.log_history


@pytest.mark.parametrize("name", PAIRWISE)
def test_it_warns_once_if_chosen_responses_fall(tmp_path, name):
    warned, history = train(tmp_path, FALLING, name)
    (message,) = warned
    facts = displacement_facts(history, 0.5)["displacement"]
    assert f"at update {facts['warned_at']} " in message
    assert "policy.training.displacement_margin" in message
    assert facts["warned_at"] < STEPS
    assert facts["last"] < -0.5
    assert history[-2]["rewards/margins"] > history[0]["rewards/margins"], "what training looks at rose"


@pytest.mark.parametrize("name", PAIRWISE)
def test_it_is_silent_if_they_rise(tmp_path, name):
    warned, history = train(tmp_path, RISING, name)
    facts = displacement_facts(history, 0.5)["displacement"]
    assert warned == []
    assert facts["warned_at"] is None
    assert facts["last"] > 0.5


def test_it_can_be_turned_off_and_the_fall_is_recorded_all_the_same(tmp_path):
    warned, history = train(tmp_path, FALLING, "dpo", margin=None)
    facts = displacement_facts(history, None)["displacement"]
    assert warned == []
    assert facts["last"] == facts["lowest"] < -0.5
    assert (facts["margin"], facts["warned_at"]) == (None, None)


@pytest.mark.parametrize(("name", "at"), [("dpo", 3), ("sepo", 6)], ids=["before", "after"])
def test_a_resumed_training_warns_neither_twice_nor_later(tmp_path, name, at):
    _, history = train(tmp_path, FALLING, name)
    values = [change.value for change in Changes().of(history)]
    margin = -(values[at - 2] + values[at - 1]) / 2  # first passed at that update
    settings = {"margin": margin, "save_strategy": "steps", "save_steps": 4, "save_total_limit": None}
    whole, history = train(tmp_path, FALLING, name, **settings)
    again, resumed = train(tmp_path, FALLING, name, resume="checkpoint-4", **settings)
    assert displacement_facts(history, margin)["displacement"]["warned_at"] == at
    assert len(whole) == 1
    assert again == (whole if at > 4 else [])
    assert displacement_facts(resumed, margin) == displacement_facts(history, margin)


def test_a_second_fall_does_not_warn_again():
    history = [{"step": step, CHANGE: value} for step, value in enumerate([0, -3, 0, 3, -9, -9], start=1)]
    assert [change.value for change in Changes().of(history)] == [0, -1.5, -1, 0, -2, -5]
    assert displacement_facts(history, 1.2)["displacement"] == {
        "last": -5.0, "lowest": -5.0, "margin": 1.2, "warned_at": 2,
    }  # fmt: skip


def test_without_a_reference_the_first_logged_value_is_the_start():
    history = [
        {"step": 1, LEVEL: -2.0},
        {"step": 1, "eval_loss": 1.0},
        {"step": 5, LEVEL: -3.0},
        {"step": 9, LEVEL: -3.5},
    ]
    assert Changes().of(history) == [(1, 0.0, False), (5, -0.5, False), (9, pytest.approx(-2.5 / 3), True)]
    assert displacement_facts(history, 0.4)["displacement"]["warned_at"] == 9
    assert displacement_facts(history, 0.9)["displacement"]["warned_at"] is None


def test_two_logged_batches_without_a_reference_say_nothing():
    """They are of other comparisons, and as far apart as those are."""
    history = [{"step": 1, LEVEL: -2.0}, {"step": 2, LEVEL: -9.0}]
    assert displacement_facts(history, 0.4)["displacement"]["warned_at"] is None


def test_an_objective_without_chosen_responses_has_no_displacement(tmp_path):
    warned, history = train(tmp_path, FALLING, "sft", margin=1e-9)
    assert warned == []
    assert displacement_facts(history, 1e-9) == {}


def test_a_margin_must_be_above_0(tmp_path):
    with pytest.raises(UserError) as caught:
        arguments(tmp_path, displacement_margin=0.0)
    assert caught.value.code == "invalid-setting"
