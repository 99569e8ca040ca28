"""Checkpoints in a folder: which are whole, and how old ones go.

A kill between any two lines must leave a checkpoint that is whole, and none that only looks so.
"""

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tokenward.artifacts import read_json


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the oldest first."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Updates of the training before a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def last_whole_checkpoint(folder: Path, last_file: str) -> Path | None:
    """The newest checkpoint that was written to its end; torn ones, after a kill or a full disk, are removed.

    Args:
        folder: Where the checkpoints are.
        last_file: The file that is written last into each, with JSON in it.
    """
    whole = []
    for checkpoint in checkpoints_of(folder):
        if _reads(checkpoint / last_file):
            whole.append(checkpoint)
        else:
            remove_checkpoint(checkpoint, last_file)
    return whole[-1] if whole else None


def _reads(path: Path) -> bool:
    try:
        read_json(path)
    except (FileNotFoundError, ValueError):  # it was not begun, or the disk was full
        return False
    return True


def remove_checkpoint(checkpoint: Path, last_file: str) -> None:
    """Remove a checkpoint; what a kill leaves of it no longer looks whole."""
    (checkpoint / last_file).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


class KeepNewest(TrainerCallback):
    """Removes old checkpoints when the newest is whole; it must be the last callback.

    transformers' own ``save_total_limit`` removes them before the callbacks have put their part into the new one.

    Args:
        last_file: The file that is written last into each.
        limit: How many to keep; None keeps all.
    """

    def __init__(self, last_file: str, limit: int | None) -> None:
        self._last_file, self._limit = last_file, limit

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove what is beyond the limit, but never the best checkpoint."""
        if not state.is_world_process_zero or self._limit is None or self._limit < 1:
            return
        best = state.best_model_checkpoint
        for checkpoint in checkpoints_of(Path(str(args.output_dir)))[: -self._limit]:
            if best is None or checkpoint.name != Path(best).name:
                remove_checkpoint(checkpoint, self._last_file)
