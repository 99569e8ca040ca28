"""A stage that a kill ends at the worst moment goes on from its newest whole checkpoint and ends the same."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import tokenward
from tests.stages.runs import LOOKS, digests, events, guided, press_when
from tokenward.display import Display
from tokenward.models.reward import RewardModel
from tokenward.stages.lists import run_through
from tokenward.training import fit
from tokenward.training.alternating import Alternating

TOTAL = 6
OFTEN = "online.training.checkpoint_minutes=0.0"
PLAIN = "online.selection={name: all}"
RUN = Path("runs/quickstart")


class Killed(BaseException):
    """Stands for the end of the process."""


def die(*args, **kwargs) -> None:
    raise Killed


@pytest.fixture
def whole(finished_online: Path) -> Path:
    """The run that a killed one must end as."""
    return finished_online / "runs" / "guided"


def cut(recipe: Path, *changes: str) -> None:
    with pytest.raises(Killed):
        guided(recipe, OFTEN, *changes, run="cut")


def goes_on(monkeypatch, recipe: Path, *changes: str, steps: list[int]):
    """The run that was cut, which makes these updates of the policy."""
    seen = press_when(monkeypatch, lambda state: False)
    run = guided(recipe, OFTEN, *changes, run="cut")
    assert [step for step, total in seen if total == TOTAL] == steps
    assert not (run.path("online") / "checkpoints").exists()
    return run


def same(one, other) -> None:
    assert digests(one) == digests(other)
    assert events(one) == events(other)


@pytest.mark.parametrize(
    "changes",
    [[PLAIN, "online.evaluate_every=1", "online.patience=2", "online.training.learning_rate=0.0"], [*LOOKS]],
    ids=["patience", "reward"],
)
def test_a_kill_after_the_last_update_makes_no_further_one(recipe, monkeypatch, whole, changes):
    if PLAIN in changes:
        whole = guided(recipe, OFTEN, *changes, run="whole").folder
    with monkeypatch.context() as patch:
        patch.setattr(fit, "_save", die)
        cut(recipe, *changes)
    again = goes_on(monkeypatch, recipe, *changes, steps=[])
    same(again, whole)
    theirs = json.loads((whole / "online" / "manifest.json").read_text())["facts"]
    for name in ("steps", "best_step", "rewards_learned"):
        assert again.done("online").facts[name] == theirs[name]
    history = (again.path("online") / "history.jsonl").read_text()
    assert "train_runtime" not in history, "a training of no update has no mean loss"
    for name in ("model/config.json", "reward/config.json"):
        if (whole / "online" / name).exists():
            assert (again.path("online") / name).read_text() == (whole / "online" / name).read_text()


def test_so_does_a_stage_of_a_run_on_comparisons(tiny_workplace, finished_run, monkeypatch):
    changes = ["oracle.training.checkpoint_minutes=0.0"]
    with monkeypatch.context() as patch:
        patch.setattr(fit, "_save", die)
        with pytest.raises(Killed):
            tokenward.run(tiny_workplace, changes, last="oracle", quiet=True)
    steps = press_when(monkeypatch, lambda state: False)
    run = tokenward.run(tiny_workplace, changes, last="oracle", quiet=True)
    assert steps == []
    assert run.done("oracle").facts["steps"] == TOTAL
    ours, theirs = (folder / "oracle/model/model.safetensors" for folder in (RUN, finished_run / RUN))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_kill_while_checkpoints_are_written_and_removed_leaves_one_to_go_on_from(
    recipe, monkeypatch, whole
):
    saved, removed = Alternating.on_save, shutil.rmtree

    def half(self, args, state, *rest, **more) -> None:
        die() if state.global_step == 3 else saved(self, args, state, *rest, **more)

    def torn(path, *args, **kwargs) -> None:
        if Path(path).name == "checkpoint-4":
            (Path(path) / "model.safetensors").unlink()
            raise Killed
        removed(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Alternating, "on_save", half)
        cut(recipe, *LOOKS)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", torn)
        cut(recipe, *LOOKS)
    same(goes_on(monkeypatch, recipe, *LOOKS, steps=[6]), whole)


def test_checkpoints_stay_until_all_that_a_stage_leaves_is_there(recipe, monkeypatch, whole):
    with monkeypatch.context() as patch:
        patch.setattr(RewardModel, "save", die)
        cut(recipe, *LOOKS)
    same(goes_on(monkeypatch, recipe, *LOOKS, steps=[]), whole)


def test_checkpoints_that_a_recipe_asks_for_stay_as_many_as_it_says(recipe):
    changes = ["online.training.save_strategy=steps", "online.training.save_steps=1"]
    run = guided(recipe, PLAIN, *changes, "online.training.save_total_limit=2")
    folder = run.path("online") / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-5", "checkpoint-6"]
    for path in folder.iterdir():
        assert json.loads((path / "alternating.json").read_text())["best"]["value"] is None


@pytest.mark.parametrize("imitated", [True, False])
def test_bfloat16_without_instructions_is_said_and_how_to_leave_it_out(
    tiny_workplace, monkeypatch, capsys, imitated
):
    monkeypatch.setattr(fit, "imitates_bfloat16", lambda device: imitated)
    tokenward.run(tiny_workplace, ["oracle.training={bf16: true, max_steps: 1}"], last="oracle")
    assert ("oracle.training.bf16=false is faster here" in capsys.readouterr().out) is imitated


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ("{name: dpo}", "first rows: loss 0.6931 (starts at ln 2 = 0.6931), margin 0.0000 nats: policy = reference"),
        ("{name: ipo}", "first rows: margin 0.0000 nats: policy = reference"),
    ],
)  # fmt: skip
def test_ln_2_is_named_where_a_loss_begins_there(tiny_workplace, tmp_path, objective, said):
    changes = ["scores.scorer={name: random}", f"policy.objective={objective}", "policy.training.max_steps=1"]
    run = tokenward.open_run(tiny_workplace, changes)
    with (tmp_path / "shown.txt").open("w") as file:
        display = Display(console=Console(file=file, width=200))
        run_through(replace(run, display=display), "policy")
    lines = [line.strip() for line in (tmp_path / "shown.txt").read_text().splitlines()]
    assert [line for line in lines if line.startswith("first rows")] == [said]


@pytest.mark.parametrize(
    ("changes", "idle"),
    [
        (["oracle.training.max_steps=1"], True),
        (["oracle.training.max_steps=1", "oracle.training.warmup_steps=0"], False),
        (["oracle.training.max_steps=2"], False),
    ],
)
def test_a_training_whose_only_update_is_warm_up_says_so_and_so_do_its_scores(
    tiny_workplace, capsys, changes, idle
):
    tokenward.run(tiny_workplace, changes, last="policy")
    out = " ".join(capsys.readouterr().out.split())
    assert ("only one update" in out) is idle
    assert ("every score is 0" in out) is idle
