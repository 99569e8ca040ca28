"""Values of a ``training`` table that this machine, or the libraries on it, cannot work with."""

import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._triton import has_triton
from transformers import Trainer, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from tokenward.config.training_fields import BY_OPTIMIZER
from tokenward.training.arguments import TokenTrainingArguments

SAMPLING = ("random", "sequential")
PROJECTED = {"galore": "galore_torch", "apollo": "apollo_torch"}
"""Optimizers that need to be told modules of the model, and their packages."""


def unworkable(
    arguments: TokenTrainingArguments, table: Mapping[str, Any], device: str
) -> Iterator[tuple[str, str]]:
    """Keys of a table that cannot work here, each with what is wrong about it.

    Args:
        arguments: Made of the table.
        table: What the user wrote.
        device: The kind of device that computes: cpu, cuda, mps.
    """
    yield from _number_types(arguments, device)
    yield from _trackers(arguments)
    optimizer = _optimizer(arguments, table)
    yield from optimizer
    yield from _schedule(arguments)
    if arguments.torch_compile and arguments.torch_compile_backend in (None, "inductor"):
        yield from _compiler(device)
    if arguments.train_sampling_strategy not in SAMPLING:
        yield (
            "train_sampling_strategy",
            f"train_sampling_strategy is {arguments.train_sampling_strategy}, and rows come in random or sequential order; they are "
            "cut into passes by length anyway (tokens_per_forward). Write random or sequential.",
        )
    if table.get("save_strategy") == "best" and table.get("eval_strategy", "no") == "no":
        yield (
            "save_strategy",
            "save_strategy is best, and nothing is evaluated to find it. Write eval_strategy: steps or epoch.",
        )
    if table.get("save_strategy") == "best" and not arguments.metric_for_best_model:
        yield (
            "save_strategy",
            "save_strategy is best, and no metric says which it is. Write metric_for_best_model: loss.",
        )


def _number_types(arguments: TokenTrainingArguments, device: str) -> Iterator[tuple[str, str]]:
    if arguments.fp16 and device != "cuda":
        yield (
            "fp16",
            f"fp16 needs a CUDA device, and this training is on {device}. Write bf16: true, or leave it out.",
        )
    if arguments.bf16 and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield "bf16", "this GPU has no instructions for bfloat16. Leave bf16 out, or write fp16: true."


def _trackers(arguments: TokenTrainingArguments) -> Iterator[tuple[str, str]]:
    for name in arguments.report_to or []:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            yield (
                "report_to",
                f"report_to names {name}, which transformers does not know. It knows {known}, and none.",
            )
            continue
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError, ValueError) as error:
            yield (
                "report_to",
                f"report_to is {name}, which cannot be used here: {_first_line(error)} Or write report_to: none.",
            )


def _optimizer(arguments: TokenTrainingArguments, table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    name = str(getattr(arguments.optim, "value", arguments.optim))
    if "layerwise" in name or "lomo" in name:
        yield (
            "optim",
            f"optim is {name}, which steps inside the backward pass, before the step's last comparison has been read. Write another, "
            "such as adamw_torch.",
        )
        return
    if any(name.startswith(kind) for kind in PROJECTED):
        yield from _projected(name, table)
        return
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        kind([nn.Parameter(torch.zeros(1))], **settings)
    except (ImportError, ValueError, TypeError, RuntimeError) as error:
        yield (
            "optim",
            f"optim is {name}, which cannot be used here: {_first_line(error)} Or write optim: adamw_torch.",
        )
        return
    for key in BY_OPTIMIZER:
        if table.get(key) is not None and not _reads(name, key):
            yield key, f"{key} is not read by optim: {name}. Leave it out, or write an optimizer that has it."


def _projected(name: str, table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    from importlib.util import find_spec

    package = next(package for kind, package in PROJECTED.items() if name.startswith(kind))
    if find_spec(package) is None:
        yield (
            "optim",
            f"optim is {name}, whose package {package} is not installed. Install it, or write optim: adamw_torch.",
        )
    elif not table.get("optim_target_modules"):
        yield (
            "optim",
            f"optim is {name}, which must be told its modules. Write optim_target_modules, for example [attn, mlp].",
        )


def _reads(optimizer: str, key: str) -> bool:
    """Whether an optimizer is made otherwise where a field says something else."""
    other = {
        "adam_beta1": 0.5,
        "adam_beta2": 0.5,
        "adam_epsilon": 0.5,
        "optim_args": "a=1",
        "optim_target_modules": "a",
    }
    made = [
        Trainer.get_optimizer_cls_and_kwargs(_plain(optimizer, more))[1] for more in ({}, {key: other[key]})
    ]
    return made[0] != made[1]


def _plain(optimizer: str, more: Mapping[str, Any]) -> TokenTrainingArguments:
    return TokenTrainingArguments(
        output_dir="unused", use_cpu=True, report_to="none", optim=optimizer, **more
    )


def _schedule(arguments: TokenTrainingArguments) -> Iterator[tuple[str, str]]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    settings: Any = arguments.lr_scheduler_kwargs
    try:
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            arguments.get_warmup_steps(100),
            100,
            scheduler_specific_kwargs=settings,
        )
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        key = "lr_scheduler_kwargs" if settings else "lr_scheduler_type"
        kind = str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type))
        yield (
            key,
            f"the schedule {kind} cannot be made: {_first_line(error)} Correct lr_scheduler_kwargs, or write another type.",
        )


def _compiler(device: str) -> Iterator[tuple[str, str]]:
    if device == "cuda" and not has_triton():
        yield (
            "torch_compile",
            "torch_compile needs triton on a GPU, and it is not there. Install it, or leave torch_compile out.",
        )
    if device == "cpu" and not any(shutil.which(name) for name in ("g++", "c++", "clang++", "cl")):
        yield (
            "torch_compile",
            "torch_compile needs a C++ compiler on a processor, and there is none. Leave torch_compile out.",
        )


def _first_line(error: Exception) -> str:
    line = str(error).strip().splitlines()[0]
    return line if line.endswith(".") else f"{line}."
