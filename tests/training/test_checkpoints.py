"""Checkpoints on disk: which count, which are kept, and what a kill while one is removed leaves."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from tokenward.training.fit import (
    KeepNewest,
    checkpoints_of,
    last_whole_checkpoint,
    remove_checkpoint,
)

LAST = "state.json"


def made(folder: Path, *steps: int) -> None:
    for step in steps:
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights").write_text("w")
        (checkpoint / LAST).write_text(json.dumps({"step": step}))


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints_of(folder)]


def saved(folder: Path, limit: int | None, *, best: str | None = None, first: bool = True) -> list[str]:
    state = SimpleNamespace(is_world_process_zero=first, best_model_checkpoint=best)
    args = SimpleNamespace(output_dir=str(folder))
    KeepNewest(LAST, limit).on_save(args, state, SimpleNamespace())
    return names(folder)


def test_steps_are_numbers_not_text(tmp_path):
    made(tmp_path, 9, 10, 100)
    assert names(tmp_path) == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert last_whole_checkpoint(tmp_path, LAST) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize("torn", [None, "", '{"step": 1'])
def test_a_torn_checkpoint_is_removed_and_the_one_before_is_gone_on_from(tmp_path, torn):
    made(tmp_path, 1, 2, 3)
    (tmp_path / "checkpoint-3" / LAST).unlink()
    if torn is not None:
        (tmp_path / "checkpoint-3" / LAST).write_text(torn)
    assert last_whole_checkpoint(tmp_path, LAST) == tmp_path / "checkpoint-2"
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_a_folder_without_checkpoints_has_none(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    assert last_whole_checkpoint(tmp_path, LAST) is None
    assert last_whole_checkpoint(tmp_path / "nowhere", LAST) is None
    assert (tmp_path / "checkpoint-best").is_dir()


def test_what_is_left_of_a_checkpoint_half_removed_does_not_count(tmp_path, monkeypatch):
    made(tmp_path, 1, 2)

    def killed(path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_checkpoint(tmp_path / "checkpoint-2", LAST)
    assert (tmp_path / "checkpoint-2" / "weights").is_file()
    assert last_whole_checkpoint(tmp_path, LAST) == tmp_path / "checkpoint-1"


def test_the_newest_and_the_best_are_kept(tmp_path):
    made(tmp_path, 1, 2, 3, 4)
    assert saved(tmp_path, None) == saved(tmp_path, 0) == saved(tmp_path, 1, first=False) == names(tmp_path)
    assert len(names(tmp_path)) == 4
    assert saved(tmp_path, 2, best="runs/x/checkpoint-1") == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    assert saved(tmp_path, 1) == ["checkpoint-4"]
