"""A ``training`` table against the fields of transformers.TrainingArguments: which act, which cannot, and why."""

import dataclasses
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Annotated, Any, get_args, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from tokenward.config.problems import either, nearest, wrong_value
from tokenward.config.source import Lines
from tokenward.errors import UserError

OURS = {
    "output_dir": "It is the stage's folder; set run to move the whole run.",
    "remove_unused_columns": "The columns of a comparison are not the model's arguments.",
    "label_names": "Labels are made from the responses.",
    "resume_from_checkpoint": "The same command goes on from a stage's own checkpoint.",
    "do_train": "A stage that has a training table trains.",
    "do_eval": "Write eval_strategy to evaluate while training.",
    "do_predict": "The evaluation stage samples replies.",
    "use_cpu": "Write model.device: cpu.",
    "local_rank": "A run works in one process.",
}
"""Fields that tokenward sets, and what to write instead."""

ACTS = frozenset(
    {
        "per_device_train_batch_size",
        "num_train_epochs",
        "max_steps",
        "learning_rate",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "optim",
        "weight_decay",
        "gradient_accumulation_steps",
        "max_grad_norm",
        "bf16",
        "fp16",
        "tf32",
        "activation_checkpointing",
        "gradient_checkpointing",
        "torch_compile",
        "torch_compile_backend",
        "torch_compile_mode",
        "logging_strategy",
        "logging_first_step",
        "logging_nan_inf_filter",
        "log_level",
        "disable_tqdm",
        "report_to",
        "eval_strategy",
        "save_strategy",
        "save_total_limit",
        "full_determinism",
        "seed",
        "data_seed",
        "dataloader_drop_last",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "train_sampling_strategy",
        "debug",
        "prediction_loss_only",  # what happens anyway
        "tokens_per_forward",
        "disable_dropout",
        "checkpoint_minutes",
        "displacement_margin",
        "log_entropy",
    }
)
"""Fields that do what transformers, or tokenward's own arguments, say; some values of them are looked at in
:mod:`tokenward.training.arguments`."""

_ONE_PROCESS = "a run works in one process"
_NO_PREDICTIONS = "an evaluation while training keeps losses, and no predictions"
_HUB = "a run uploads nothing. Export the model (tokenward export RUN FOLDER), and upload the folder (hf upload NAME FOLDER)"
_LIGER = "its layers take the place of the model's, and tokenward's own head already keeps no logits"

CANNOT_ACT = {
    "label_smoothing_factor": "the loss is the objective's. Write label_smoothing in the objective, where it has it",
    "average_tokens_across_devices": _ONE_PROCESS,
    "log_on_each_node": _ONE_PROCESS,
    "log_level_replica": _ONE_PROCESS,
    "save_on_each_node": _ONE_PROCESS,
    "ddp_find_unused_parameters": _ONE_PROCESS,
    "ddp_bucket_cap_mb": _ONE_PROCESS,
    "ddp_broadcast_buffers": _ONE_PROCESS,
    "ddp_static_graph": _ONE_PROCESS,
    "ddp_backend": _ONE_PROCESS,
    "ddp_timeout": _ONE_PROCESS,
    "fsdp": _ONE_PROCESS,
    "fsdp_config": _ONE_PROCESS,
    "deepspeed": _ONE_PROCESS,
    "parallelism_config": _ONE_PROCESS,
    "accelerator_config": f"{_ONE_PROCESS}, and tokenward counts rows by accelerate's own settings",
    "bf16_full_eval": "a model that trains is evaluated in the type in which it trains. Write bf16",
    "fp16_full_eval": "a model that trains is evaluated in the type in which it trains. Write fp16",
    "use_cache": "training reads whole rows and keeps no cache",
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    "neftune_noise_alpha": "its noise would depend on how rows are laid out, and policy and reference would not agree at the start",
    "torch_empty_cache_steps": "tokenward's step does not do it. Lower tokens_per_forward for less memory",
    "auto_find_batch_size": "it would change the update. Lower tokens_per_forward, which changes memory and not the update",
    "include_num_input_tokens_seen": "the manifest and the log already count tokens",
    "eval_do_concat_batches": _NO_PREDICTIONS,
    "eval_use_gather_object": _NO_PREDICTIONS,
    "eval_accumulation_steps": _NO_PREDICTIONS,
    "include_for_metrics": _NO_PREDICTIONS,
    "batch_eval_metrics": _NO_PREDICTIONS,
    "save_only_model": "a stopped run could not go on from such a checkpoint. Write save_total_limit to keep fewer",
    "enable_jit_checkpoint": "the training would end where it stopped and be taken for finished. Ctrl-C writes a checkpoint",
    "ignore_data_skip": "a stopped run would not see the rows that it had not seen yet",
    "restore_callback_states_from_checkpoint": "no callback of a run has a state of that kind",
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "length_column_name": "rows have no such column; batches are cut by length already (tokens_per_forward)",
    "skip_memory_metrics": "the manifest has the memory already",
}
"""Fields whose default may be written in a recipe and nothing else, each with why."""

CANNOT_ACT_IN_SCRIPT = {
    **{
        name: CANNOT_ACT[name]
        for name in (
            "label_smoothing_factor",
            "use_liger_kernel",
            "liger_kernel_config",
            "neftune_noise_alpha",
            "torch_empty_cache_steps",
            "auto_find_batch_size",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "eval_accumulation_steps",
            "include_for_metrics",
            "batch_eval_metrics",
            "length_column_name",
        )
    },
    "include_num_input_tokens_seen": "the speed callback counts tokens, and rows are not named input_ids",
    "label_names": "labels are made from the responses",
}
"""The same for arguments of a script, where processes, uploads and checkpoints are the user's own."""


def _evaluates(table: Mapping[str, Any]) -> bool:
    return table.get("eval_strategy", "no") != "no"


def _evaluates_by_steps(table: Mapping[str, Any]) -> bool:
    return table.get("eval_strategy", "no") == "steps"


def _saves_by_steps(table: Mapping[str, Any]) -> bool:
    return table.get("save_strategy", "no") == "steps"


def _logs_by_steps(table: Mapping[str, Any]) -> bool:
    return table.get("logging_strategy", "steps") == "steps"


def _looks_for_the_best(table: Mapping[str, Any]) -> bool:
    adaptive = table.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy")
    return bool(table.get("load_best_model_at_end")) or table.get("save_strategy") == "best" or adaptive


def _has_workers(table: Mapping[str, Any]) -> bool:
    return bool(table.get("dataloader_num_workers"))


def _checkpoints(table: Mapping[str, Any]) -> bool:
    return bool(table.get("gradient_checkpointing") or table.get("activation_checkpointing"))


def _tracked(table: Mapping[str, Any]) -> bool:
    return table.get("report_to", "none") not in ("none", None, [], ["none"])


def _on_trackio(table: Mapping[str, Any]) -> bool:
    trackers = table.get("report_to", "none")
    names = [trackers] if isinstance(trackers, str) else trackers or []
    return "trackio" in names or "all" in names


def _warms_up(table: Mapping[str, Any]) -> bool:
    return table["lr_scheduler_type"] != "constant"


BESIDE = {
    "eval_steps": (_evaluates_by_steps, "eval_strategy: steps"),
    "eval_delay": (_evaluates, "eval_strategy: steps or epoch"),
    "eval_on_start": (_evaluates, "eval_strategy: steps or epoch"),
    "per_device_eval_batch_size": (_evaluates, "eval_strategy: steps or epoch"),
    "load_best_model_at_end": (_evaluates, "eval_strategy and save_strategy: steps or epoch, and metric_for_best_model"),
    "metric_for_best_model": (_looks_for_the_best, "load_best_model_at_end: true, or save_strategy: best"),
    "greater_is_better": (_looks_for_the_best, "load_best_model_at_end: true, or save_strategy: best"),
    "save_steps": (_saves_by_steps, "save_strategy: steps"),
    "logging_steps": (_logs_by_steps, "logging_strategy: steps"),
    "warmup_steps": (_warms_up, "lr_scheduler_type: constant_with_warmup, linear or another that warms up"),
    "gradient_checkpointing_kwargs": (_checkpoints, "gradient_checkpointing: true"),
    "activation_checkpointing_kwargs": (_checkpoints, "activation_checkpointing: true"),
    "dataloader_persistent_workers": (_has_workers, "dataloader_num_workers: 1 or more"),
    "dataloader_prefetch_factor": (_has_workers, "dataloader_num_workers: 1 or more"),
    "dataloader_multiprocessing_context": (_has_workers, "dataloader_num_workers: 1 or more"),
    "dataloader_in_order": (_has_workers, "dataloader_num_workers: 1 or more"),
    "run_name": (_tracked, "report_to: wandb or another tracker"),
    "project": (_on_trackio, "report_to: trackio"),
    "trackio_space_id": (_on_trackio, "report_to: trackio"),
    "trackio_bucket_id": (_on_trackio, "report_to: trackio"),
    "trackio_static_space_id": (_on_trackio, "report_to: trackio"),
}  # fmt: skip
"""Fields that act beside another alone: whether it is there, and what to write."""

BY_OPTIMIZER = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "optim_target_modules")
"""Fields that some optimizers read; :mod:`tokenward.training.arguments` asks the one of the recipe."""

EVALUATION = ("eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size")
"""Fields of an evaluation, which act in an online run's reward too, whose looks are said elsewhere."""


def idle_fields(
    table: Mapping[str, Any],
    defaults: Mapping[str, Any],
    *,
    schedule: str = "linear",
    looked_at: bool = False,
) -> Iterator[tuple[str, str]]:
    """Fields that were written and that nothing would read, each with what is wrong about it.

    Args:
        table: The recipe's ``training`` table.
        defaults: Of TrainingArguments, by name.
        schedule: The table's ``lr_scheduler_type`` where it has none.
        looked_at: Whether an evaluation comes although the table has no ``eval_strategy``.
    """
    whole = {"lr_scheduler_type": schedule, **table}
    for key, value in table.items():
        if key in CANNOT_ACT and value != defaults[key]:
            yield key, f"{key} cannot act in a recipe: {CANNOT_ACT[key]}. Leave it out here."
        elif key in BESIDE and value != defaults[key] and not (looked_at and key in EVALUATION):
            there, advice = BESIDE[key]
            if not there(whole):
                yield (
                    key,
                    f"{key} acts only beside {advice}, which is not in this table. Write that too, or leave it out.",
                )


_AT_LEAST = {
    "learning_rate": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
}


def check_training(
    table: Mapping[str, Any], where: str, lines: Lines, *, schedule: str = "linear", looked_at: bool = False
) -> None:
    """Refuse keys that TrainingArguments lacks or that cannot act in a recipe, and values that are not of their type.

    Args:
        table: the ``training`` table.
        where: its dotted path in the recipe, such as ``oracle.training``.
        lines: where the recipe's keys were written.
        schedule: the table's ``lr_scheduler_type`` where it has none.
        looked_at: whether an evaluation comes although the table has no ``eval_strategy``.

    Raises:
        UserError: for every such key or value, with its line and what is allowed.
    """
    from tokenward.training.arguments import (
        TokenTrainingArguments,  # it imports torch, which help and `config` must not wait for
    )

    names = [f.name for f in dataclasses.fields(TokenTrainingArguments) if f.init and f.name not in OURS]
    hints = get_type_hints(TokenTrainingArguments)
    found = {
        key: _wrong(f"{where}.{key}", value, hints[key]) if key in names else _problem(key, where, names)
        for key, value in table.items()
    }
    if not any(found.values()):
        found |= dict(
            idle_fields(table, _defaults(TokenTrainingArguments), schedule=schedule, looked_at=looked_at)
        )
    problems = [f"{lines.where(f'{where}.{key}')}: {problem}" for key, problem in found.items() if problem]
    if problems:
        raise UserError("\n".join(problems))


def _defaults(arguments: type) -> dict[str, Any]:
    fields = dataclasses.fields(arguments)
    made = {f.name: f.default_factory() for f in fields if f.default_factory is not dataclasses.MISSING}
    return {f.name: f.default for f in fields} | made


def _wrong(key: str, value: Any, hint: Any) -> str:
    """What is wrong with a value, or nothing; TrainingArguments itself looks at hardly any type."""
    least = _AT_LEAST.get(key.rpartition(".")[2])
    annotation: Any = _words_only(hint) if least is None else Annotated[hint, Field(ge=least)]
    if _fits(value, annotation):
        return ""
    message = wrong_value(key, value, FieldInfo.from_annotation(annotation)).message
    return message if value is not None else f"{message} Leave it out for the default."


def _words_only(hint: Any) -> Any:
    """An enumeration alone, where the hint has text beside it: no other text is understood."""
    enums = [kind for kind in get_args(hint) if isinstance(kind, type) and issubclass(kind, Enum)]
    return enums[0] if enums else hint


def _fits(value: Any, annotation: Any) -> bool:
    adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    is_enum = isinstance(annotation, type) and issubclass(annotation, Enum)
    try:
        adapter.validate_python(value, strict=not is_enum)  # members are written as text
    except ValidationError:
        return False
    return True


def _problem(key: str, where: str, names: list[str]) -> str:
    if key in OURS:
        return f"tokenward sets '{key}' itself, so it cannot stand in {where}. {OURS[key]}"
    close = nearest(key, names)
    advice = (
        f"Did you mean {either([repr(name) for name in close])}?"
        if close
        else "See transformers.TrainingArguments."
    )
    return f"unknown key '{key}' in {where}. {advice}"
