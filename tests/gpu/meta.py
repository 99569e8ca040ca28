"""Training on torch's meta device, which has shapes and no numbers: it shows where the host would wait for a GPU.

A tensor there raises as soon as a number of it is asked for: ``item``, ``tolist``, ``bool``, ``nonzero``, ``bincount``, a boolean
index, a copy to the CPU. On a GPU the same calls wait until all work before them is done.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import PartialState
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from tokenward.training.trainer import TokenTrainer

META = torch.device("meta")


class BlockingCopies(TorchDispatchMode):
    """Raises where a tensor of the CPU is copied to the meta device and the host would wait for the copy."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        copied = function is torch.ops.aten._to_copy.default and args[0].device.type == "cpu"
        if copied and kwargs.get("device") == META and not kwargs.get("non_blocking"):
            raise RuntimeError(f"a blocking copy of {tuple(args[0].shape)} {args[0].dtype}")
        return function(*args, **kwargs)


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
        step = TokenTrainer.training_step

        def watched(*given: Any, **named: Any) -> torch.Tensor:
            with BlockingCopies():
                return step(*given, **named)

        patch.setattr(TokenTrainer, "training_step", watched)
        yield
