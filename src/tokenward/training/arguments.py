"""TrainingArguments with tokenward's own settings, and values that this machine cannot work with."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._triton import has_triton
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from tokenward.config.training import BY_OPTIMIZER, CANNOT_ACT_IN_SCRIPT
from tokenward.errors import UserError


@dataclass
class TokenTrainingArguments(TrainingArguments):
    """Arguments of :class:`tokenward.training.trainer.TokenTrainer`.

    Attributes:
        tokens_per_forward: Padded tokens that the model reads at once; a batch with more is cut into
            several passes of similar lengths. It changes memory and speed, not the update.
        disable_dropout: Set every dropout to 0, so that policy and reference agree at the start.
        checkpoint_minutes: Save a checkpoint this often, besides what ``save_strategy`` says.
        displacement_margin: Say so when the chosen responses have become less likely than at the start by more than
            this, nats per token (:mod:`tokenward.training.metrics`); None never does.
        log_entropy: Log ``entropy``, the policy's mean entropy at the tokens that train, in nats. The update is the same.
    """

    tokens_per_forward: int = field(default=4096)
    disable_dropout: bool = field(default=True)
    checkpoint_minutes: float = field(default=10.0)
    displacement_margin: float | None = field(default=0.5)
    log_entropy: bool = field(default=False)

    def __post_init__(self) -> None:
        if self.tokens_per_forward < 1:
            raise UserError(f"tokens_per_forward must be at least 1, got {self.tokens_per_forward}.")
        if self.displacement_margin is not None and not self.displacement_margin > 0:
            raise UserError(
                f"displacement_margin must be greater than 0, got {self.displacement_margin}: a fall that small is noise. "
                "Write for example 0.5. None (null in a recipe) turns the alarm off."
            )
        super().__post_init__()


DEFAULTS: dict[str, Any] = {
    "learning_rate": 1e-6,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "logging_steps": 5,
    "logging_first_step": True,
    "save_strategy": "no",
    "save_total_limit": 1,
    "report_to": "none",
    "disable_tqdm": True,
    # A loss that is not finite stops the run here; it is never averaged away.
    "logging_nan_inf_filter": False,
}


def training_arguments(
    table: dict[str, Any], *, folder: Path, seed: int, where: str, device: str = "auto"
) -> TokenTrainingArguments:
    """Arguments from a recipe's ``training`` table.

    Args:
        table: Fields of ``TrainingArguments``, as the user wrote them.
        folder: Where checkpoints go.
        seed: The recipe's seed, unless the table has its own.
        where: Name of the table, for messages.
        device: The recipe's ``model.device``.

    Raises:
        UserError: transformers refuses the values.
    """
    if device.rpartition(":")[2].isdigit() and not device.endswith(":0"):
        raise UserError(
            f"model.device is {device}, but training runs on the first device that torch sees. Write model.device: auto and set "
            f"CUDA_VISIBLE_DEVICES={device.rpartition(':')[2]}."
        )
    use_cpu = device == "cpu" or not torch.accelerator.is_available()
    settings: dict[str, Any] = {**DEFAULTS, "seed": seed, "use_cpu": use_cpu, **table}
    try:
        arguments = TokenTrainingArguments(output_dir=str(folder), remove_unused_columns=False, **settings)
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(
            f"{where}: {str(error).strip().splitlines()[0]} Correct the value in this table."
        ) from error
    _check_length(arguments, where)
    # nn.DataParallel copies a model without its asking head; several GPUs need a process each.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def token_arguments(args: TrainingArguments) -> TokenTrainingArguments:
    """A script's arguments as tokenward's own: every field is kept, and tokenward's further ones have their defaults.

    ``remove_unused_columns`` is set to False, because the columns of a comparison are not arguments of the model. One
    process trains on one GPU.

    Args:
        args: transformers' arguments, or tokenward's. They are not changed.

    Raises:
        UserError: a field that cannot act here has another value than its default, or a subclass brings fields that
            tokenward does not know.
    """
    if not isinstance(args, TrainingArguments):
        raise UserError(
            f"args is {type(args).__name__}. Give transformers.TrainingArguments or tokenward.TokenTrainingArguments."
        )
    made = TokenTrainingArguments.__new__(TokenTrainingArguments)
    own = {item.name: _default(item) for item in fields(TokenTrainingArguments)}
    # The attributes are copied as they are: __post_init__ has done its work, and may not be meant to run twice.
    vars(made).update({name: own[name] for name in _OWN}, **vars(args))
    made.remove_unused_columns = False
    made.dataloader_pin_memory &= made.device.type != "cpu"  # torch warns of it on a processor alone
    foreign = {item.name: _default(item) for item in fields(args) if item.name not in own}
    _check_acts(args, {name: own[name] for name in CANNOT_ACT_IN_SCRIPT}, foreign)
    _check_length(made, "args")
    if made.train_sampling_strategy not in ("random", "sequential"):
        raise UserError(
            f"args.train_sampling_strategy is {made.train_sampling_strategy!r}. Rows come in random or sequential order, and are "
            "cut into passes by length anyway (tokens_per_forward). Write random or sequential."
        )
    made._n_gpu = min(made.n_gpu, 1)  # nn.DataParallel copies a model without its selective head
    return made


_OWN = ("tokens_per_forward", "disable_dropout", "checkpoint_minutes", "displacement_margin", "log_entropy")


def _default(item: "Field[Any]") -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _check_acts(args: TrainingArguments, idle: Mapping[str, Any], foreign: Mapping[str, Any]) -> None:
    """Refuse fields that were set and that nothing here reads."""
    for name, default in idle.items():
        if getattr(args, name) != default:
            raise UserError(
                f"args.{name} is {getattr(args, name)!r} and cannot act here: {CANNOT_ACT_IN_SCRIPT[name]}. Leave it out."
            )
    unread = [name for name, default in foreign.items() if getattr(args, name) != default]
    if unread:
        raise UserError(
            f"args is {type(args).__name__}, and nothing here reads its {', '.join(unread)}. Give "
            "tokenward.TokenTrainingArguments. What the loss is belongs to objective=, what a token is to tokens=."
        )


def check_batches(table: Mapping[str, Any], rows: int, where: str) -> None:
    """Refuse a training whose only batch is dropped because it is not full.

    Args:
        table: The recipe's.
        rows: Comparisons that it trains on, at most.
        where: Name of the table.

    Raises:
        UserError: as above.
    """
    size = table.get("per_device_train_batch_size", DEFAULTS["per_device_train_batch_size"])
    if table.get("dataloader_drop_last") and rows < size:
        raise UserError(
            f"{where}.dataloader_drop_last drops the last batch where it is not full, and {rows} rows do not fill one of {size}: nothing "
            f"would be trained. Leave it out, or lower {where}.per_device_train_batch_size."
        )


def _check_length(arguments: TokenTrainingArguments, where: str) -> None:
    """Refuse a training without an update."""
    if arguments.max_steps == 0 or arguments.max_steps < -1:
        raise UserError(
            f"{where}: max_steps is {arguments.max_steps}, which trains nothing. Write 1 or more, or leave it out to train for "
            "num_train_epochs."
        )
    if arguments.max_steps == -1 and arguments.num_train_epochs <= 0:
        raise UserError(
            f"{where}: num_train_epochs is {arguments.num_train_epochs:g}, which trains nothing. Write a number greater than 0, "
            "such as 1."
        )


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
