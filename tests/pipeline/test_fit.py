"""A stage that a kill ends at the worst moment goes on from its newest whole checkpoint and ends the same."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import tokenward
from tests.pipeline.tools import digests, events, guided, guided_recipe, press_when
from tokenward.display import Display
from tokenward.models.reward import RewardModel
from tokenward.stages.lists import run_through
from tokenward.training import fit
from tokenward.training.alternating import Alternating

TOTAL = 6
OFTEN = "online.training.checkpoint_minutes=0.0"
PLAIN = "online.selection={name: all}"
PATIENT = [
    "online.evaluate_every=1", "online.patience=2", "online.training.learning_rate=0.0",
]  # fmt: skip
RUN = Path("runs/quickstart")


class Killed(BaseException):
    """Stands for the end of the process."""


def die(*args, **kwargs) -> None:
    raise Killed


@pytest.fixture
def recipe(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = guided_recipe(tmp_path / "work", tiny_folder)
    monkeypatch.chdir(made.parent)
    return made


def cut(recipe: Path, *changes: str) -> None:
    with pytest.raises(Killed):
        guided(recipe, OFTEN, *changes, run="cut")


@pytest.mark.parametrize("changes", [[PLAIN], [PLAIN, *PATIENT], []], ids=["last", "patience", "reward"])
def test_a_kill_after_the_last_update_makes_no_further_one(recipe, monkeypatch, changes):
    whole = guided(recipe, OFTEN, *changes, run="whole")
    with monkeypatch.context() as patch:
        patch.setattr(fit, "_save", die)
        cut(recipe, *changes)
    steps = press_when(monkeypatch, lambda state: False)
    again = guided(recipe, OFTEN, *changes, run="cut")
    assert steps == []
    assert digests(again) == digests(whole)
    assert events(again) == events(whole)
    ours, theirs = (run.done("online").facts for run in (again, whole))
    assert {name: ours[name] for name in ("steps", "best_step", "rewards_learned")} == {
        name: theirs[name] for name in ("steps", "best_step", "rewards_learned")
    }
    history = (again.path("online") / "history.jsonl").read_text()
    assert "train_runtime" not in history, "a training of no update has no mean loss"
    for name in ("model/config.json", "reward/config.json"):
        if (whole.path("online") / name).exists():
            assert (again.path("online") / name).read_text() == (whole.path("online") / name).read_text()


def test_so_does_a_stage_of_a_run_on_comparisons(tiny_workplace, finished_run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fit, "_save", die)
        with pytest.raises(Killed):
            tokenward.run(
                tiny_workplace, ["oracle.training.checkpoint_minutes=0.0"], last="oracle", quiet=True
            )
    steps = press_when(monkeypatch, lambda state: False)
    run = tokenward.run(tiny_workplace, ["oracle.training.checkpoint_minutes=0.0"], last="oracle", quiet=True)
    assert steps == []
    assert run.done("oracle").facts["steps"] == TOTAL
    ours, theirs = (folder / "oracle/model/model.safetensors" for folder in (RUN, finished_run / RUN))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(recipe, monkeypatch):
    whole = guided(recipe, run="whole")
    with monkeypatch.context() as patch:
        plain = Alternating.on_save
        patch.setattr(
            Alternating,
            "on_save",
            lambda self, args, state, *rest, **more: (
                die() if state.global_step == 4 else plain(self, args, state, *rest, **more)
            ),
        )
        cut(recipe)
    steps = press_when(monkeypatch, lambda state: False)
    again = guided(recipe, OFTEN, run="cut")
    assert [step for step in steps if step[1] == TOTAL] == [(4, TOTAL), (5, TOTAL), (6, TOTAL)]
    assert digests(again) == digests(whole)
    assert events(again) == events(whole)


def test_a_kill_while_old_checkpoints_are_removed_leaves_one_to_go_on_from(recipe, monkeypatch):
    plain = shutil.rmtree

    def torn(path, *args, **kwargs) -> None:
        if Path(path).name == "checkpoint-3":
            (Path(path) / "model.safetensors").unlink()
            raise Killed
        plain(path, *args, **kwargs)

    whole = guided(recipe, PLAIN, run="whole")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", torn)
        cut(recipe, PLAIN)
    steps = press_when(monkeypatch, lambda state: False)
    assert digests(guided(recipe, OFTEN, PLAIN, run="cut")) == digests(whole)
    assert steps == [(5, TOTAL), (6, TOTAL)]


def test_checkpoints_stay_until_all_that_a_stage_leaves_is_there(recipe, monkeypatch):
    whole = guided(recipe, run="whole")
    with monkeypatch.context() as patch:
        patch.setattr(RewardModel, "save", die)
        cut(recipe)
    steps = press_when(monkeypatch, lambda state: False)
    again = guided(recipe, OFTEN, run="cut")
    assert steps == []
    assert digests(again) == digests(whole)
    assert not (again.path("online") / "checkpoints").exists()


def test_checkpoints_that_a_recipe_asks_for_stay_as_many_as_it_says(recipe):
    changes = ["online.training.save_strategy=steps", "online.training.save_steps=1"]
    run = guided(recipe, PLAIN, *changes, "online.training.save_total_limit=2")
    folder = run.path("online") / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-5", "checkpoint-6"]
    assert all(
        json.loads((path / "alternating.json").read_text())["best"]["value"] is None
        for path in folder.iterdir()
    )


@pytest.mark.parametrize("imitated", [True, False])
def test_bfloat16_without_instructions_is_said_and_how_to_leave_it_out(
    tiny_workplace, monkeypatch, capsys, imitated
):
    monkeypatch.setattr(fit, "imitates_bfloat16", lambda device: imitated)
    tokenward.run(tiny_workplace, ["oracle.training.bf16=true"], last="oracle")
    assert ("oracle.training.bf16=false is faster here" in capsys.readouterr().out) is imitated


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ("{name: dpo}", "first rows: loss 0.6931 (begins at ln 2 = 0.6931), margin 0.0000 nats: policy = reference"),
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
    assert ("one update in all" in out) is idle
    assert ("every score is 0" in out) is idle
