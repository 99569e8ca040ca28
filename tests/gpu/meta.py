"""Training on torch's meta device, which has shapes and no numbers: it shows where the host would wait for a GPU.

A tensor there raises as soon as a number of it is asked for: ``item``, ``tolist``, ``bool``, ``nonzero``, ``bincount``, a boolean
index, a copy to the CPU. On a GPU the same calls wait until all work before them is done.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback

META = torch.device("meta")


class Stop(Exception):
    """Raised after a step: the end of a training reads its loss."""


class Stopping(TrainerCallback):
    """Stops after the first optimizer step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise Stop


@contextmanager
def on_meta(monkeypatch: Any, arguments: Any) -> Iterator[None]:
    """While open, a Trainer with these arguments trains on the meta device, without autocast, which does not know it."""
    assert arguments.device.type == "cpu"
    plain, enabled = torch.autocast, torch.is_autocast_enabled
    with monkeypatch.context() as patch:
        patch.setitem(vars(arguments), "_setup_devices", META)
        patch.setitem(PartialState._shared_state, "device", META)
        patch.setattr(
            torch, "autocast", lambda kind, *a, **k: nullcontext() if kind == "meta" else plain(kind, *a, **k)
        )
        patch.setattr(torch, "is_autocast_enabled", lambda kind="cuda": kind != "meta" and enabled(kind))
        yield
