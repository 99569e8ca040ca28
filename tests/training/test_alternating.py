"""The alternating loop: what happens when, what is kept, what a checkpoint holds, and a training inside a training."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import GradientState
from torch import nn

from tests.tiny import tiny_llama
from tests.training.tools import arguments, language_model, largest_difference, random_rows, weights_of
from tokenward.errors import UserError
from tokenward.objectives import SFT
from tokenward.training.alternating import Alternating, Schedule, separate_training
from tokenward.training.callbacks import KeepBest
from tokenward.training.trainer import TokenTrainer


@pytest.mark.parametrize(
    ("every", "until", "total", "expected"),
    [
        # tlm.md, 8.1 item 11: the prompt task, and 5 epochs of 8,973 updates at half-epoch period.
        (1000, 0.5, 12_000, list(range(0, 6001, 1000))),
        (4486, 0.4, 44_865, [0, 4486, 8972, 13458, 17944]),
        (3188, 0.4, 31_885, [0, 3188, 6376, 9564, 12752]),  # the same with 6,377 updates, XSum's
        (None, 1.0, 100, [0]),
        (10, 0.0, 100, [0]),
        (10, 1.0, 100, list(range(0, 100, 10))),  # after the last update there is nothing to learn for
        (101, 1.0, 100, [0]),
        (29, 0.29, 100, [0, 29]),  # 0.29 * 100 is 28.999999999999996
        (7, 0.07, 100, [0, 7]),  # and 0.07 * 100 is 7.000000000000001
        (5, 0.49, 10, [0]),  # 4.9 updates: the fifth is after that
        (5, 0.5, 10, [0, 5]),
    ],
)
def test_the_reward_is_learned_before_the_first_update_and_then_until_its_share(
    every, until, total, expected
):
    schedule = Schedule(every=every, until=until)
    assert [step for step in range(total + 1) if schedule.learns_at(step, total)] == expected


@pytest.mark.parametrize(
    ("every", "total", "expected"),
    [(None, 9, []), (3, 9, [0, 3, 6, 9]), (4, 9, [0, 4, 8, 9]), (20, 9, [0, 9]), (1, 2, [0, 1, 2])],
)
def test_the_policy_is_evaluated_from_the_start_to_the_end(every, total, expected):
    schedule = Schedule(evaluate_every=every)
    assert [step for step in range(total + 1) if schedule.evaluates_at(step, total)] == expected


@pytest.mark.parametrize("until", [-0.1, 1.1, float("nan")])
def test_a_share_is_between_0_and_1(until):
    with pytest.raises(UserError) as caught:
        Schedule(until=until)
    assert caught.value.key == "online.until"


class Loop:
    """A policy of one number that each update raises by 1, and a reward that grows by 1 when it is learned."""

    def __init__(
        self, folder, schedule: Schedule, scores=None, *, patience=None, steps=10, learn=True
    ) -> None:
        self.policy, self.reward = (nn.Linear(1, 1, bias=False) for _ in range(2))
        for module in (self.policy, self.reward):
            nn.init.zeros_(module.weight)
        self.scores, self.log, self.folder, self.steps = scores, [], folder, steps
        self.lines: list[str] = []
        self.loop = Alternating(
            schedule,
            learn=self.learned if learn else None,
            reward=self.reward if learn else None,
            evaluate=self.judged if scores is not None else None,
            best=KeepBest(self.policy, larger_is_better=True, patience=patience),
            show=self.lines.append,
        )

    def learned(self, phase: int, step: int) -> dict:
        self.log.append(("learn", phase, step, float(self.policy.weight.detach())))
        self.reward.weight.data.add_(1)
        return {"loss": 0.5}

    def judged(self, step: int) -> dict[str, float]:
        self.log.append(("judge", step, float(self.policy.weight.detach())))
        return {"score": self.scores[step]}

    def run(self, start: int = 0, stop: int | None = None) -> int:
        """What transformers' Trainer calls; returns the step after which it ended."""
        args = SimpleNamespace(learning_rate=0.1, output_dir=str(self.folder))
        state = SimpleNamespace(global_step=start, max_steps=self.steps, is_world_process_zero=True)
        control = SimpleNamespace(should_training_stop=False)
        self.loop.on_train_begin(args, state, control)
        while state.global_step < self.steps and not control.should_training_stop:
            state.global_step += 1
            self.policy.weight.data.add_(1)
            self.loop.on_step_end(args, state, control)
            if state.global_step == stop:
                (self.folder / f"checkpoint-{stop}").mkdir()
                self.loop.on_save(args, state, control)
                break
        return state.global_step

    def finished(self) -> float:
        """The policy after the loop has put back the best."""
        self.loop.finish()
        return float(self.policy.weight.detach())

    def kinds(self) -> list[str]:
        return [event["event"] for event in self.loop.events]


def test_learning_comes_before_the_first_update_and_between_updates(tmp_path):
    made = Loop(tmp_path, Schedule(every=3, until=0.6), steps=9)
    assert made.run() == 9
    # (phase, step, the policy as it was then: one per update so far)
    assert made.log == [("learn", 0, 0, 0.0), ("learn", 1, 3, 3.0)]
    assert made.loop.events == [
        {"event": "reward", "step": 0, "phase": 0, "loss": 0.5},
        {"event": "reward", "step": 3, "phase": 1, "loss": 0.5},
    ]
    assert made.lines[1] == "  reward: step 3  phase 1  loss 0.5"
    assert made.loop.best_step is None
    assert made.finished() == 9, "without an evaluation the last policy stays"


def test_the_policy_is_evaluated_before_the_reward_learns_from_it(tmp_path):
    schedule = Schedule(every=2, until=1.0, evaluate_every=2)
    made = Loop(tmp_path, schedule, dict.fromkeys(range(5), 0.0), steps=4)
    made.run()
    assert made.log == [
        ("judge", 0, 0.0), ("learn", 0, 0, 0.0), ("judge", 2, 2.0), ("learn", 1, 2, 2.0), ("judge", 4, 4.0),
    ]  # fmt: skip
    alone = Loop(tmp_path, Schedule(every=1, evaluate_every=5), dict.fromkeys(range(11), 1.0), learn=False)
    alone.run()
    assert alone.kinds() == ["policy"] * 3


def test_the_best_policy_is_put_back(tmp_path):
    made = Loop(tmp_path, Schedule(evaluate_every=2), {0: 1.0, 2: 3.0, 4: 7.0, 6: 2.0, 8: 7.0, 10: 0.0})
    assert made.run() == 10
    assert [(e["step"], e["best"]) for e in made.loop.events if e["event"] == "policy"] == [
        (0, True), (2, True), (4, True), (6, False), (8, False), (10, False),
    ]  # fmt: skip
    assert made.loop.best_step == made.finished() == 4


def test_patience_stops_the_policy_and_nothing_is_learned_after_that(tmp_path):
    scores = {0: 1.0, 2: 5.0, 4: 4.0, 6: 4.0, 8: 9.0}
    made = Loop(tmp_path, Schedule(every=6, until=1.0, evaluate_every=2), scores, patience=2)
    assert made.run() == 6
    assert made.kinds() == ["policy", "reward", "policy", "policy", "policy", "stop"]
    assert made.loop.events[-1]["step"] == 6
    assert made.finished() == 2


@pytest.mark.parametrize("stop", range(1, 9))
def test_a_resumed_loop_ends_as_if_it_had_not_stopped(tmp_path, stop):
    schedule = Schedule(every=3, until=0.9, evaluate_every=2)
    scores = {0: 1.0, 2: 5.0, 4: 4.0, 6: 6.0, 8: 4.0, 9: 2.0}
    whole, first, again = (
        Loop(tmp_path / name, schedule, scores, steps=9) for name in ("whole", "parts", "parts")
    )
    (tmp_path / "parts").mkdir()
    whole.run()
    first.run(stop=stop)
    again.policy.weight.data.fill_(stop)  # transformers restores the policy itself
    again.run(start=stop)
    assert again.loop.events == whole.loop.events
    assert first.log + again.log == whole.log, "nothing happens twice"
    assert again.reward.weight.tolist() == whole.reward.weight.tolist() == [[3]]
    for made in (again, whole):
        assert made.finished() == made.loop.best_step == 6


def test_patience_goes_on_counting_after_a_resume(tmp_path):
    schedule, scores = Schedule(evaluate_every=1), {0: 5.0} | dict.fromkeys(range(1, 11), 1.0)
    made = Loop(tmp_path, schedule, scores, patience=3)
    made.run(stop=2)
    record = json.loads((tmp_path / "checkpoint-2" / "alternating.json").read_text())
    assert record == {"events": made.loop.events, "best": {"value": 5.0, "step": 0, "waited": 2}}
    assert Loop(tmp_path, schedule, scores, patience=3).run(start=2) == 3


def test_only_one_process_writes_the_checkpoint(tmp_path):
    state = SimpleNamespace(global_step=1, max_steps=2, is_world_process_zero=False)
    loop = Loop(tmp_path, Schedule()).loop
    loop.on_save(SimpleNamespace(learning_rate=0.1, output_dir=str(tmp_path)), state, SimpleNamespace())
    assert list(tmp_path.iterdir()) == []


def test_a_separate_training_leaves_generators_and_loaders_as_they_were_even_after_an_error():
    gradients = GradientState()
    loaders = list(gradients.dataloader_references)

    class Opened:
        """Stands for a data loader, to which accelerate keeps a weak reference."""

    def draws():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seed():
        for function in (random.seed, np.random.seed, torch.manual_seed):
            function(4)

    def stopped() -> None:
        with separate_training():
            torch.manual_seed(99)
            draws()
            gradients.dataloader_references = [None, Opened()]
            raise KeyboardInterrupt

    seed()
    expected = draws()
    seed()
    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert draws() == expected
    assert gradients.dataloader_references == loaders


def test_a_trainer_inside_a_trainer_does_not_disturb_it(tmp_path):
    """The inner one stops early, in the middle of its data, as it does when patience ends."""
    rows = random_rows(7)
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 6}

    def inner(phase: int, step: int) -> dict:
        model, made = language_model(tiny_llama(seed=1)), arguments(tmp_path / "inner", max_steps=1)
        TokenTrainer(model, SFT(), made, random_rows(12, seed=3)).train()
        return {}

    def run(name: str, learn):
        model = language_model()
        best = KeepBest(model.model, larger_is_better=True, patience=None)
        schedule = Schedule(every=2, until=1.0)
        loop = Alternating(schedule, learn=learn, reward=nn.Linear(1, 1), evaluate=None, best=best)
        trainer = TokenTrainer(model, SFT(), arguments(tmp_path / name, **settings), rows, callbacks=[loop])
        trainer.train()
        losses = [entry.get("loss") for entry in trainer.state.log_history]
        return weights_of(trainer.model), [e["step"] for e in loop.events], losses

    alone, none, plain_losses = run("alone", None)
    nested, steps, losses = run("nested", inner)
    assert (none, steps, losses) == ([], [0, 2, 4], plain_losses)
    assert largest_difference(alone, nested) == 0.0
    assert largest_difference(alone, weights_of(tiny_llama())) > 1e-3
