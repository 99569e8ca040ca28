"""Whole optimizer steps of a transformers Trainer, one at a time, when the parent asks."""

from collections.abc import Mapping
from time import perf_counter
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.workers import Actions, Channel, memory_now

ENDLESS = 100_000
"""More steps than anybody asks for: the parent says when it is enough."""


class Gate(TrainerCallback):
    """Stops the Trainer's own loop between two steps until the parent asks for the next.

    The clock runs from the request to the end of the step: logging of the step before, the next batch and
    its collation, forward, backward, clipping, optimizer, schedule. It is what ``train()`` spends on a step.
    """

    def __init__(self, channel: Channel, actions: Actions, facts: Mapping[str, Any]) -> None:
        self._channel = channel
        self._actions = {"memory": _memory, **actions}
        self._facts = facts
        self._start = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ready: the parent decides from here."""
        self._channel.send(self._facts)
        self._wait()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Answer with the step's time, and wait."""
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
    """Fields of ``TrainingArguments`` that both sides are given."""
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
    """Move a model a little, the same on both sides.

    At its own reference DPO's loss is ln 2 whatever the code does; a comparison there would see nothing.
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
