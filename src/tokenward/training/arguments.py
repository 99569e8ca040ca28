"""TrainingArguments with tokenward's settings, and checks for values that cannot work on this machine."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._triton import has_triton
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from tokenward.config.training import BY_OPTIMIZER, CANNOT_ACT_IN_SCRIPT
from tokenward.errors import UserError
from tokenward.plugins import check_fields, described
from tokenward.trl_names import answers_trl, trl_advice


@answers_trl
@dataclass
class TokenTrainingArguments(TrainingArguments):
    """Arguments of :class:`tokenward.training.trainer.TokenTrainer`.

    Attributes:
        tokens_per_forward: Maximum number of padded tokens in one forward pass. A larger batch is cut into passes of
            similar lengths. Changes memory and speed, not the update.
        disable_dropout: Set every dropout to 0, so that policy and reference agree at the start.
        checkpoint_minutes: Save a checkpoint at this interval, in addition to ``save_strategy``.
        displacement_margin: Warn if the chosen responses become less likely than at the start by more than this many
            nats per token (:mod:`tokenward.training.metrics`). None turns the warning off.
        log_entropy: Log ``entropy``, the policy's mean entropy (nats) over the trained tokens. Does not change the
            update.
        logging_dir: Folder of TensorBoard's event files; None is transformers' choice, a folder in ``output_dir``.
    """

    tokens_per_forward: int = 4096
    disable_dropout: bool = True
    checkpoint_minutes: float = 10.0
    displacement_margin: float | None = 0.5
    log_entropy: bool = False
    logging_dir: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, _OWN)
        if self.tokens_per_forward < 1:
            got = self.tokens_per_forward
            raise UserError(f"tokens_per_forward must be at least 1, got {got}.", code="invalid-setting")
        if self.displacement_margin is not None and not self.displacement_margin > 0:
            raise UserError(
                f"displacement_margin must be greater than 0, got {self.displacement_margin}. Use None to turn the warning off.",
                code="invalid-setting",
            )
        super().__post_init__()

    def __getstate__(self) -> dict[str, Any]:
        """All fields but the token of the hub: transformers pickles its arguments beside every checkpoint and saved model."""
        return {**vars(self), "hub_token": None}


_OWN = (
    "tokens_per_forward",
    "disable_dropout",
    "checkpoint_minutes",
    "displacement_margin",
    "log_entropy",
    "logging_dir",
)

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
    # transformers would replace a non-finite loss by the running average; here it stops the run.
    "logging_nan_inf_filter": False,
}


def training_arguments(
    table: dict[str, Any], *, folder: Path, seed: int, where: str, device: str = "auto"
) -> TokenTrainingArguments:
    """Training arguments from a recipe's ``training`` table, whose dotted key is ``where``.

    ``folder`` is for checkpoints, ``seed`` is used unless the table has one, ``device`` is the recipe's ``model.device``.

    Raises:
        UserError: transformers rejects the values.
    """
    index = device.rpartition(":")[2]
    if index.isdigit() and index != "0":
        raise UserError(
            f"training runs on the first device that torch sees, not on {device}. Use auto with CUDA_VISIBLE_DEVICES={index}.",
            code="unsupported-device",
            key="model.device",
        )
    use_cpu = device == "cpu" or not torch.accelerator.is_available()
    # One process tells what all have to say.
    own = {"seed": seed, "use_cpu": use_cpu, "log_level_replica": "error"}
    settings: dict[str, Any] = {**DEFAULTS, **own, **table}
    try:
        arguments = TokenTrainingArguments(output_dir=str(folder), remove_unused_columns=False, **settings)
    except UserError as error:
        raise UserError(str(error), code=error.code, key=where) from error
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(_first_line(error), code="invalid-setting", key=where) from error
    _check_length(arguments, where)
    _use_one_gpu(arguments)
    return arguments


def token_arguments(args: TrainingArguments) -> TokenTrainingArguments:
    """A script's ``TrainingArguments`` with tokenward's extra fields at their defaults.

    ``args`` is not modified. ``remove_unused_columns`` becomes False, because the columns of a comparison are not
    arguments of the model, and one process trains on one GPU.

    Raises:
        UserError: a field that has no effect here is not at its default, or a subclass adds fields that tokenward
            does not know.
    """
    if not isinstance(args, TrainingArguments):
        raise UserError(
            f"args is {described(args)}. Pass transformers.TrainingArguments or tokenward.TokenTrainingArguments.",
            code="wrong-type",
        )
    made = TokenTrainingArguments.__new__(TokenTrainingArguments)
    own = {item.name: _default(item) for item in fields(TokenTrainingArguments)}
    # Attributes are copied as they are: __post_init__ has already run on args and may not be safe to run twice.
    vars(made).update({name: own[name] for name in _OWN}, **vars(args))
    made.remove_unused_columns = False
    made.dataloader_pin_memory &= made.device.type != "cpu"  # torch warns about pinning on a CPU-only machine
    _check_unused(args, {item.name: _default(item) for item in fields(args) if item.name not in own}, own)
    _check_length(made, "args")
    if problem := _wrong_sampling(made):
        raise UserError(f"args.{problem}", code="invalid-setting")
    _use_one_gpu(made)
    return made


def _use_one_gpu(arguments: TokenTrainingArguments) -> None:
    # With several GPUs transformers would wrap the model in nn.DataParallel, whose replicas lack the selective head.
    arguments._n_gpu = min(arguments.n_gpu, 1)


def _default(item: "Field[Any]") -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _check_unused(args: TrainingArguments, foreign: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Reject fields that were set but are not used."""
    for name, reason in CANNOT_ACT_IN_SCRIPT.items():
        if (value := getattr(args, name)) != own[name]:
            raise UserError(
                f"args.{name} is {value!r}, which has no effect here: {reason}. Leave it out.",
                code="unused-setting",
            )
    unread = [name for name, default in foreign.items() if getattr(args, name) != default]
    if unread:
        raise UserError(
            f"args is {type(args).__name__}, whose {', '.join(unread)} is not used here. Pass "
            "tokenward.TokenTrainingArguments; settings of the loss belong in objective=, tokenization in tokens=."
            + "".join(f" {advice}" for name in unread if (advice := trl_advice(name, recipe=False))),
            code="unused-setting",
        )


def check_batches(table: Mapping[str, Any], rows: int, where: str) -> None:
    """Reject a ``training`` table under which the only batch would be dropped because it is not full."""
    size = table.get("per_device_train_batch_size", DEFAULTS["per_device_train_batch_size"])
    if table.get("dataloader_drop_last") and rows < size:
        raise UserError(
            f"dataloader_drop_last drops the last batch if it is not full, and {rows} rows do not fill one of {size}: nothing would "
            "be trained. Leave it out, or lower per_device_train_batch_size.",
            code="no-updates",
            key=f"{where}.dataloader_drop_last",
        )


def _check_length(arguments: TokenTrainingArguments, where: str) -> None:
    """Reject a training without an update."""
    steps, epochs = arguments.max_steps, arguments.num_train_epochs
    if steps == 0 or steps < -1:
        raise UserError(
            f"max_steps is {steps}, so nothing would be trained. Set it to 1 or more, or leave it out to use num_train_epochs.",
            code="no-updates",
            key=f"{where}.max_steps",
        )
    if steps == -1 and epochs <= 0:
        raise UserError(
            f"num_train_epochs is {epochs:g}, so nothing would be trained. Set it to a number above 0, such as 1.",
            code="no-updates",
            key=f"{where}.num_train_epochs",
        )


def _wrong_sampling(arguments: TokenTrainingArguments) -> str:
    strategy = arguments.train_sampling_strategy
    if strategy in ("random", "sequential"):
        return ""
    return (
        f"train_sampling_strategy is {strategy}, which is not supported: batches are cut by length anyway "
        "(tokens_per_forward). Use random or sequential."
    )


def unworkable(
    arguments: TokenTrainingArguments, table: Mapping[str, Any], device: str
) -> Iterator[tuple[str, str]]:
    """Settings of a ``training`` table that cannot work on a device type (cpu, cuda, mps), each with an error message."""
    yield from _number_types(arguments, device)
    yield from _trackers(arguments)
    yield from _optimizer(arguments, table)
    yield from _schedule(arguments)
    if arguments.torch_compile and arguments.torch_compile_backend in (None, "inductor"):
        yield from _compiler(device)
    if problem := _wrong_sampling(arguments):
        yield "train_sampling_strategy", problem
    if table.get("save_strategy") == "best":
        if table.get("eval_strategy", "no") == "no":
            yield (
                "save_strategy",
                "save_strategy best needs an evaluation. Set eval_strategy to steps or epoch.",
            )
        if not arguments.metric_for_best_model:
            yield (
                "save_strategy",
                "save_strategy best needs a metric. Set metric_for_best_model, for example to loss.",
            )


def _number_types(arguments: TokenTrainingArguments, device: str) -> Iterator[tuple[str, str]]:
    if arguments.fp16 and device != "cuda":
        yield "fp16", f"fp16 needs a CUDA device, but training runs on {device}. Use bf16, or leave fp16 out."
    if arguments.bf16 and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield "bf16", "this GPU has no bfloat16 instructions. Use fp16, or leave bf16 out."


def _trackers(arguments: TokenTrainingArguments) -> Iterator[tuple[str, str]]:
    for name in arguments.report_to or []:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            yield "report_to", f"transformers has no tracker {name}. Known are none, {known}."
            continue
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError, ValueError) as error:
            yield "report_to", f"the tracker {name} does not work here: {_first_line(error)} Or use none."


PROJECTED = {"galore": "galore_torch", "apollo": "apollo_torch"}
"""Optimizers that need ``optim_target_modules``, and their packages."""


def _optimizer(arguments: TokenTrainingArguments, table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    name = str(getattr(arguments.optim, "value", arguments.optim))
    if "layerwise" in name or "lomo" in name:
        # The denominator of a step is known only after its last pass; see StepDenominator.
        yield "optim", f"{name} updates weights inside the backward pass. Use for example adamw_torch."
        return
    package = next((package for kind, package in PROJECTED.items() if name.startswith(kind)), None)
    if package is not None:  # transformers builds these only with the model at hand
        if find_spec(package) is None:
            yield "optim", f"{name} needs the package {package}, which is not installed. Or use adamw_torch."
        elif not table.get("optim_target_modules"):
            yield "optim", f"{name} needs optim_target_modules, for example [attn, mlp]."
        return
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        kind([nn.Parameter(torch.zeros(1))], **settings)
    except (ImportError, ValueError, TypeError, RuntimeError) as error:
        yield "optim", f"the optimizer {name} does not work here: {_first_line(error)} Or use adamw_torch."
        return
    for key in BY_OPTIMIZER:
        if table.get(key) is not None and not _uses(name, key):
            yield key, f"the optimizer {name} does not use {key}. Leave it out, or use another optimizer."


def _uses(optimizer: str, key: str) -> bool:
    """Whether a setting changes what transformers passes to an optimizer."""
    other: Any = {"optim_args": "a=1", "optim_target_modules": "a"}.get(key, 0.5)
    plain: dict[str, Any] = {"output_dir": "unused", "use_cpu": True, "report_to": "none", "optim": optimizer}
    made = [TokenTrainingArguments(**plain), TokenTrainingArguments(**plain, **{key: other})]
    first, second = (Trainer.get_optimizer_cls_and_kwargs(arguments)[1] for arguments in made)
    return first != second


def _schedule(arguments: TokenTrainingArguments) -> Iterator[tuple[str, str]]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    kind, settings = arguments.lr_scheduler_type, arguments.lr_scheduler_kwargs
    try:
        warmup = arguments.get_warmup_steps(100)
        get_scheduler(kind, optimizer, warmup, 100, scheduler_specific_kwargs=settings)  # type: ignore[arg-type]
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        key, name = "lr_scheduler_kwargs" if settings else "lr_scheduler_type", getattr(kind, "value", kind)
        reason = _first_line(error)
        yield (
            key,
            f"the schedule {name} cannot be created: {reason} Fix lr_scheduler_kwargs, or use another type.",
        )


def _compiler(device: str) -> Iterator[tuple[str, str]]:
    if device == "cuda" and not has_triton():
        yield "torch_compile", "torch_compile needs triton on a GPU. Install it, or leave torch_compile out."
    if device == "cpu" and not any(shutil.which(name) for name in ("g++", "c++", "clang++", "cl")):
        yield "torch_compile", "torch_compile needs a C++ compiler on a CPU. Install one, or leave it out."


def _first_line(error: Exception) -> str:
    line = str(error).strip().splitlines()[0]
    return line if line.endswith(".") else f"{line}."
