"""Checkpoints on disk: what each holds, which are whole, which are kept, and what becomes of damaged ones."""

import json
import shutil
from collections.abc import Callable
from itertools import chain, count
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from transformers import TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Args
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tokenward.artifacts import atomic_write, read_json
from tokenward.artifacts.outputs import File, damage, recorded, said
from tokenward.distributed import wait_for_all

FILES = "files.json"
"""Size and digest of every other file of a checkpoint; written last."""

DAMAGED = f"damaged-{PREFIX_CHECKPOINT_DIR}-"
"""Begin of the names of checkpoints that were found damaged; no training looks at them."""

_ENTRIES = TypeAdapter(dict[str, File])


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the oldest first."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    return sorted(found, key=step_of)


def damaged_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder that were set aside because they are damaged."""
    return sorted(folder.glob(f"{DAMAGED}*"))


def step_of(checkpoint: Path) -> int:
    """The number of updates after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def record_files(checkpoint: Path) -> None:
    """Write size and digest of every file of a finished checkpoint into it."""
    found = {name: entry for name, entry in recorded(checkpoint).items() if name != FILES}
    atomic_write(checkpoint / FILES, json.dumps(found, indent=1) + "\n")


def checkpoint_damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, such as ``checkpoint-4/optimizer.pt is missing``.

    Every file is read. The answer is empty if nothing is wrong, and for a checkpoint whose files were not recorded.
    """
    path = checkpoint / FILES
    if not path.is_file():
        return ""
    try:
        files = _ENTRIES.validate_json(path.read_bytes())
    except ValueError:
        return f"{checkpoint.name}/{FILES} cannot be read"
    found = damage(checkpoint, files)
    return said(checkpoint, found) if found else ""


def last_whole_checkpoint(
    folder: Path,
    last_file: str,
    say: Callable[[str], None] = lambda line: None,
    *,
    with_best: bool = False,
    tidy: bool = True,
) -> Path | None:
    """The newest checkpoint whose files are those that were written; None if a training must start from the beginning.

    Damaged checkpoints that are newer get another name, and ``say`` is called with a line for each. A checkpoint without recorded
    files is taken on trust if no older one has them: an earlier version wrote it. Otherwise it was cut off.

    Args:
        folder: Where the checkpoints are.
        last_file: The JSON file that is written last into each before its files are recorded.
        say: Called with lines for the user.
        with_best: Whether a checkpoint also needs the best one that it names, which is loaded at the end of the training.
        tidy: Whether to remove checkpoints that were cut off, by a kill or a full disk.
    """
    ready = []
    for checkpoint in checkpoints_of(folder):
        if _cut_off(checkpoint, last_file, ready):
            if tidy:
                remove_checkpoint(checkpoint, last_file)
        else:
            ready.append(checkpoint)
    for checkpoint in reversed(ready):
        problem = checkpoint_damage(checkpoint) or (_damage_of_best(checkpoint) if with_best else "")
        if not problem:
            if not (checkpoint / FILES).is_file():
                say(f"  {checkpoint.name} has no {FILES}: its files are taken on trust")
            return checkpoint
        say(f"  damaged checkpoint: {problem}. It is now {_set_aside(checkpoint).name}")
    if ready:
        say("  no whole checkpoint is left: the training starts from the beginning")
    return None


def _cut_off(checkpoint: Path, last_file: str, older: list[Path]) -> bool:
    if (checkpoint / FILES).is_file():
        return False
    try:
        read_json(checkpoint / last_file)
    except (FileNotFoundError, ValueError):
        return True
    return any((path / FILES).is_file() for path in older)


def _damage_of_best(checkpoint: Path) -> str:
    """What is wrong with the best checkpoint so far, as a checkpoint names it."""
    named = read_json(checkpoint / TRAINER_STATE_NAME)["best_model_checkpoint"]
    if named is None:
        return ""
    best = checkpoint.with_name(Path(named).name)
    problem = checkpoint_damage(best) if best.is_dir() else f"{best.name} is missing"
    return f"{checkpoint.name} needs the best one so far, and {problem}" if problem else ""


def _set_aside(checkpoint: Path) -> Path:
    first = checkpoint.with_name(f"{DAMAGED}{step_of(checkpoint)}")
    others = (Path(f"{first}.{number}") for number in count(2))
    place = next(path for path in chain([first], others) if not path.exists())
    return checkpoint.rename(place)


def remove_checkpoint(checkpoint: Path, last_file: str) -> None:
    """Remove a checkpoint. What makes it look complete goes first, so that a kill in between leaves none that does."""
    for name in (FILES, last_file):  # with the first file gone alone, it is still whole
        (checkpoint / name).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


class RecordFiles(TrainerCallback):
    """Records the files of each checkpoint in it. Must come after every callback that adds files, in all processes."""

    def on_save(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        wait_for_all()  # each process writes files of its own
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():  # a search of hyperparameters writes elsewhere
            record_files(folder)


class KeepNewest(TrainerCallback):
    """Removes old checkpoints once the newest is complete; must be the last callback.

    transformers' own ``save_total_limit`` removes them before callbacks have added their files to the new one.
    """

    def __init__(self, last_file: str, limit: int | None) -> None:
        self._last_file, self._limit = last_file, limit

    def on_save(self, args: Args, state: State, control: Control, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self._limit is None or self._limit < 1:
            return
        best = state.best_model_checkpoint
        for checkpoint in checkpoints_of(Path(str(args.output_dir)))[: -self._limit]:
            if best is None or checkpoint.name != Path(best).name:
                remove_checkpoint(checkpoint, self._last_file)
