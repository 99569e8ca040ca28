"""Trackers' files outlive the training, and each training has a record of its own."""

from pathlib import Path
from types import SimpleNamespace

import pytest

import tokenward
from tests.stages.runs import online_recipe, refusal, run_online
from tokenward.artifacts import Manifest, StageFolder
from tokenward.training.callbacks import CheckpointEvery
from tokenward.training.trackers import own_record, tracker_defaults

OFTEN = "oracle.training.checkpoint_minutes=0.0"


@pytest.fixture
def recipe(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder is one with an online recipe on examples."""
    made = online_recipe(tmp_path / "work", tiny_folder)
    monkeypatch.chdir(made.parent)
    return made


def logged(folder: Path, name: str = "train/loss") -> list[int]:
    """The steps of a value in the event files of a folder, without those of the folders in it."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return [event.step for event in accumulator.EventAccumulator(str(folder)).Reload().Scalars(name)]


def test_event_files_stay_in_the_folder_of_their_stage(tiny_workplace: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    keys = ("report_to=tensorboard", "logging_steps=2")
    changes = [f"{stage}.training.{key}" for stage in ("oracle", "policy") for key in keys]
    changes += [OFTEN, f"policy.training.logging_dir={tmp_path / 'own'}"]
    run = tokenward.run(tiny_workplace, changes, last="policy", quiet=True)
    assert logged(run.path("oracle") / "tensorboard") == [1, 2, 4, 6]
    assert logged(tmp_path / "own") == [1, 2, 4]
    assert not (run.path("oracle") / "checkpoints").exists()


def test_each_reward_of_an_online_run_has_its_own_curve(recipe: Path) -> None:
    pytest.importorskip("tensorboard")
    to = "training.report_to=tensorboard"
    run = run_online(recipe, f"online.{to}", f"reward.{to}", "online.training.logging_steps=3")
    folder = run.path("online") / "tensorboard"
    assert logged(folder) == [1, 3, 6]
    assert [logged(folder / f"reward-{phase}")[-1] for phase in (0, 1)] == [1, 1]


def test_a_trackers_file_among_the_checkpoints_stays(tiny_workplace: Path, monkeypatch) -> None:
    def write(self, args, state, control, **kwargs) -> None:
        Path(args.output_dir, "emissions.csv").touch()
        control.should_save = True

    monkeypatch.setattr(CheckpointEvery, "on_step_end", write)
    run = tokenward.run(tiny_workplace, last="oracle", quiet=True)
    assert [path.name for path in (run.path("oracle") / "checkpoints").iterdir()] == ["emissions.csv"]


def test_a_folder_for_all_event_files_has_one_for_each_stage(tmp_path: Path, monkeypatch) -> None:
    begun = Manifest.begin("policy", {}, {}, 1).model_copy(update={"created": "2026-01-02T03:04:05+00:00"})
    stage = StageFolder(tmp_path / "quickstart" / "policy", begun)
    assert tracker_defaults(stage)["logging_dir"] == str(stage.path / "tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "events")
    found = tracker_defaults(stage, "reward-0")
    assert found["logging_dir"] == str(Path("events/quickstart/policy/reward-0"))
    assert found["run_name"] == "quickstart/policy/reward-0 2026-01-02T03:04:05"


@pytest.mark.parametrize("begun_before", [False, True])
def test_the_record_of_a_training_ends_with_it(begun_before: bool) -> None:
    """But one that a script began stays open."""
    ended: list[str] = []
    tracker = SimpleNamespace(run="a record" if begun_before else None, finish=lambda: ended.append("wandb"))
    with own_record({"wandb": tracker}):
        tracker.run = "a record"
    assert ended == ([] if begun_before else ["wandb"])


def test_an_online_policy_and_its_reward_cannot_share_a_record(recipe: Path) -> None:
    error = refusal(recipe, [f"{table}.training.report_to=wandb" for table in ("online", "reward")])
    assert (error.code, error.key) == ("conflicting-keys", "reward.training.report_to")


def test_dvclive_keeps_one_training(tiny_workplace: Path, monkeypatch) -> None:
    monkeypatch.setattr("tokenward.stages.checks.unworkable", lambda *_: ())  # it is not installed
    error = refusal(tiny_workplace, [f"{table}.training.report_to=dvclive" for table in ("oracle", "policy")])
    assert (error.code, error.key) == ("conflicting-keys", "policy.training.report_to")
