"""Runs single optimizer steps of a transformers Trainer on request of the parent process."""

from collections.abc import Mapping
from time import perf_counter
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.workers import Actions, Channel, memory_now

ENDLESS = 100_000
"""More steps than any measurement needs; the parent ends the training."""


class Gate(TrainerCallback):
    """Pauses the Trainer's loop after each step until the parent requests the next one.

    The time is measured from the request to the end of the step. It includes everything that ``train()`` does for a
    step: logging of the previous step, the next batch and its collation, forward, backward, clipping, optimizer and
    schedule.
    """

    def __init__(self, channel: Channel, actions: Actions, facts: Mapping[str, Any]) -> None:
        self._channel = channel
        self._actions = {"memory": _memory, **actions}
        self._facts = facts
        self._start = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the parent that the side is ready, and wait."""
        self._channel.send(self._facts)
        self._wait()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Send the time of the step, and wait."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._channel.send({"seconds": perf_counter() - self._start, "step": state.global_step})
        self._wait()

    def _wait(self) -> None:
        while (request := self._channel.receive())["do"] != "step":
            self._channel.send(self._actions[request["do"]](request))
        self._start = perf_counter()


def _memory(request: dict[str, Any]) -> dict[str, Any]:
    found = memory_now(request)
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.max_memory_allocated()
    return found


def common_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ``TrainingArguments`` that both sides share."""
    return {
        "per_device_train_batch_size": settings["batch"],
        "max_steps": ENDLESS,
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 10,
        "logging_first_step": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "activation_checkpointing": False,
        "bf16": settings["precision"] == "bfloat16",
        "use_cpu": settings["device"] == "cpu",
        "seed": settings["seed"],
        "disable_dropout": True,
    }


def nudge(model: nn.Module, *, seed: int = 0, share: float = 0.02) -> None:
    """Move a model's weights slightly, in the same way on both sides.

    At the reference, DPO's loss is always ln 2, so comparing the sides there would show nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            noise = (
                torch.randn(value.shape, generator=generator)
                * share
                * float(value.float().std().nan_to_num())
            )
            value += noise.to(value)
