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
from tokenward.training.checkpoints import (
    FILES,
    KeepNewest,
    RecordFiles,
    checkpoint_damage,
    checkpoints_of,
    last_whole_checkpoint,
    record_files,
    remove_checkpoint,
)

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


def record(folder: Path, *steps: int) -> None:
    for step in steps:
        state = SimpleNamespace(global_step=step, is_world_process_zero=True)
        RecordFiles().on_save(SimpleNamespace(output_dir=str(folder)), state, SimpleNamespace())


def test_one_bit_in_any_file_of_a_checkpoint_is_found(tmp_path):
    write_checkpoints(tmp_path, 1)
    checkpoint = tmp_path / "checkpoint-1"
    (checkpoint / "global_step1").mkdir()
    (checkpoint / "global_step1" / "rank_1.pt").write_bytes(b"part")
    record_files(checkpoint)
    record_files(checkpoint)  # saved twice after one update
    assert checkpoint_damage(checkpoint) == ""
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    assert len(files) == 4
    for path in files:
        before = path.read_bytes()
        for place in range(8 * len(before)):
            changed = bytearray(before)
            changed[place // 8] ^= 1 << place % 8
            path.write_bytes(changed)
            # A bit of the list itself may be in the space between its entries.
            assert checkpoint_damage(checkpoint) or json.loads(changed) == json.loads(before)
        path.write_bytes(before)
    (checkpoint / FILES).write_text("[]")
    assert checkpoint_damage(checkpoint) == f"checkpoint-1/{FILES} cannot be read"


def test_damaged_checkpoints_are_set_aside_and_an_older_one_is_used(tmp_path):
    write_checkpoints(tmp_path, 1, 2, 3, 4)
    record(tmp_path, 1, 2, 3, 4)
    (tmp_path / "checkpoint-2" / "weights").write_text("x")  # older than the one that is used: not looked at
    (tmp_path / "checkpoint-4" / LAST).unlink()
    lines = []
    assert last_whole_checkpoint(tmp_path, LAST, lines.append) == tmp_path / "checkpoint-3"
    (tmp_path / "checkpoint-3" / "weights").write_text("ww")
    write_checkpoints(tmp_path, 4)
    record(tmp_path, 4)
    (tmp_path / "checkpoint-4" / "weights").unlink()
    assert last_whole_checkpoint(tmp_path, LAST, lines.append) == tmp_path / "checkpoint-1"
    assert [line.partition("fingerprint")[0] for line in lines] == [
        f"  damaged checkpoint: checkpoint-4/{LAST} is missing. It is now damaged-checkpoint-4",
        "  damaged checkpoint: checkpoint-4/weights is missing. It is now damaged-checkpoint-4.2",
        "  damaged checkpoint: checkpoint-3/weights has 2 bytes instead of 1. It is now damaged-checkpoint-3",
        "  damaged checkpoint: checkpoint-2/weights has other content (",
    ]
    assert names(tmp_path) == ["checkpoint-1"]


def test_without_a_whole_checkpoint_the_training_begins_again(tmp_path):
    write_checkpoints(tmp_path, 1)
    record(tmp_path, 1)
    (tmp_path / "checkpoint-1" / "weights").unlink()
    lines = []
    assert last_whole_checkpoint(tmp_path, LAST, lines.append) is None
    assert lines[1:] == ["  no whole checkpoint is left: the training starts from the beginning"]
    assert (tmp_path / "damaged-checkpoint-1").is_dir()


def test_a_checkpoint_without_recorded_files_is_trusted_only_if_no_older_one_has_them(tmp_path):
    write_checkpoints(tmp_path, 1, 2, 3)
    lines = []
    assert last_whole_checkpoint(tmp_path, LAST, lines.append) == tmp_path / "checkpoint-3"
    assert lines == [f"  checkpoint-3 has no {FILES}: its files are taken on trust"]
    record(tmp_path, 2)  # checkpoint-3 was cut off before it was finished
    assert last_whole_checkpoint(tmp_path, LAST, lines.append, tidy=False) == tmp_path / "checkpoint-2"
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert last_whole_checkpoint(tmp_path, LAST, lines.append) == tmp_path / "checkpoint-2"
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    assert len(lines) == 1


def test_a_checkpoint_needs_the_best_one_that_it_would_load_at_the_end(tmp_path):
    write_checkpoints(tmp_path, 1, 2, 3)
    for step, best in ((1, None), (2, "runs/x/checkpoint-2"), (3, "runs/x/checkpoint-2")):
        state = {"best_model_checkpoint": best}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    record(tmp_path, 1, 2, 3)
    (tmp_path / "checkpoint-2" / "weights").unlink()
    assert last_whole_checkpoint(tmp_path, LAST) == tmp_path / "checkpoint-3"
    lines = []
    assert last_whole_checkpoint(tmp_path, LAST, lines.append, with_best=True) == tmp_path / "checkpoint-1"
    assert "checkpoint-3 needs the best one so far, and checkpoint-2/weights is missing" in lines[0]


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
