"""Checkpoints on disk: which count, which are kept, what a kill leaves, and Ctrl-C."""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from tokenward.errors import StoppedBySignal
from tokenward.training.callbacks import StopOnInterrupt
from tokenward.training.fit import KeepNewest, checkpoints_of, last_whole_checkpoint, remove_checkpoint

LAST = "state.json"


def write_checkpoints(folder: Path, *steps: int) -> None:
    for step in steps:
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights").write_text("w")
        (checkpoint / LAST).write_text(json.dumps({"step": step}))


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints_of(folder)]


def test_steps_are_numbers_not_text(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole_checkpoint(tmp_path, LAST) is last_whole_checkpoint(tmp_path / "nowhere", LAST) is None
    write_checkpoints(tmp_path, 9, 10, 100)
    assert names(tmp_path) == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert last_whole_checkpoint(tmp_path, LAST) == tmp_path / "checkpoint-100"
    assert (tmp_path / "checkpoint-best").is_dir()


@pytest.mark.parametrize("torn", [None, "", '{"step": 1'])
def test_an_incomplete_checkpoint_is_removed_and_the_one_before_is_used(tmp_path, torn):
    write_checkpoints(tmp_path, 1, 2, 3)
    (tmp_path / "checkpoint-3" / LAST).unlink()
    if torn is not None:
        (tmp_path / "checkpoint-3" / LAST).write_text(torn)
    assert last_whole_checkpoint(tmp_path, LAST) == tmp_path / "checkpoint-2"
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_a_half_removed_checkpoint_does_not_count(tmp_path, monkeypatch):
    write_checkpoints(tmp_path, 1, 2)

    def killed(path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_checkpoint(tmp_path / "checkpoint-2", LAST)
    assert (tmp_path / "checkpoint-2" / "weights").is_file()
    assert last_whole_checkpoint(tmp_path, LAST) == tmp_path / "checkpoint-1"


def test_the_newest_and_the_best_are_kept(tmp_path):
    def kept(limit: int | None, *, best: str | None = None, first: bool = True) -> list[str]:
        state = SimpleNamespace(is_world_process_zero=first, best_model_checkpoint=best)
        KeepNewest(LAST, limit).on_save(SimpleNamespace(output_dir=str(tmp_path)), state, SimpleNamespace())
        return names(tmp_path)

    write_checkpoints(tmp_path, 1, 2, 3, 4)
    assert len(kept(None)) == len(kept(0)) == len(kept(1, first=False)) == 4
    assert kept(2, best="runs/x/checkpoint-1") == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    assert kept(1) == ["checkpoint-4"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_saves_and_stops_and_the_second_stops_at_once(capfd, number):
    with StopOnInterrupt().listening() as stop:
        os.kill(os.getpid(), number)
        assert stop.signal == number
        assert "stopping after this step" in capfd.readouterr().err
        control = SimpleNamespace(should_save=False, should_training_stop=False)
        stop.on_step_end(None, None, control)
        assert control.should_save
        assert control.should_training_stop
        with pytest.raises(StoppedBySignal) as caught:
            os.kill(os.getpid(), number)
    assert caught.value.signal == number
    assert capfd.readouterr().err == ""
