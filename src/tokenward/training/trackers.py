"""Trackers: where their files are, and one record for each training."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.integrations.integration_utils import TensorBoardCallback

from tokenward.artifacts import EVENTS, StageFolder, user_path


def tracker_defaults(stage: StageFolder, part: str = "") -> dict[str, Any]:
    """Training arguments of a stage, or of a part of it: the name of its record, and the folder of its event files.

    The name has the time at which the stage began, because some trackers continue the record of an equal name: a resumed
    stage does, one that runs again does not. transformers would write event files among the checkpoints.
    ``TENSORBOARD_LOGGING_DIR`` names one folder for all stages; each has its own in it, or their curves would be one.
    """
    name = Path(stage.path.parent.name, stage.path.name, part)
    wanted = os.environ.get("TENSORBOARD_LOGGING_DIR")
    return {
        "run_name": f"{name.as_posix()} {stage.manifest.created[:19]}",
        "logging_dir": str(Path(wanted) / name if wanted else stage.path / EVENTS / part),
    }


def place_event_files(trainer: Trainer, folder: str | None) -> None:
    """Let TensorBoard's callback write to a folder; None leaves transformers' own choice."""
    for callback in trainer.callback_handler.callbacks if folder is not None else ():
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = str(user_path(folder or ""))


@contextmanager
def own_record(modules: Mapping[str, Any] = sys.modules) -> Iterator[None]:
    """End the records of trackers that begin inside, so that the next training of this process begins its own.

    transformers leaves these open, for figures that a script may add. The curves of two stages would be one.
    """
    before = {name for name in _OPEN if _is_open(name, modules)}
    try:
        yield
    finally:
        for name in _OPEN:
            if name not in before and _is_open(name, modules):
                _end(name, modules[name])


_OPEN: dict[str, Callable[[Any], Any]] = {
    "comet_ml": lambda module: module.get_running_experiment(),
    "wandb": lambda module: module.run,
}


def _is_open(name: str, modules: Mapping[str, Any]) -> bool:
    return name in modules and _OPEN[name](modules[name]) is not None


def _end(name: str, module: Any) -> None:
    module.end() if name == "comet_ml" else module.finish()
