"""Checks a ``training`` table against the fields of transformers.TrainingArguments: which have an effect, and which cannot."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Annotated, Any, get_args, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from tokenward.config.problems import Problem, either, nearest, refusal, wrong_value
from tokenward.config.source import Lines
from tokenward.trl_names import trl_advice

OURS = {
    "output_dir": "It is the stage's folder. Set run to move the whole run.",
    "remove_unused_columns": "The columns of a comparison are not arguments of the model.",
    "label_names": "Labels are made from the responses.",
    "resume_from_checkpoint": "The same command resumes a stage from its own checkpoint.",
    "do_train": "A stage with a training table trains.",
    "do_eval": "Write eval_strategy to evaluate during training.",
    "do_predict": "The evaluation stage samples replies.",
    "use_cpu": "Write model.device: cpu.",
    "local_rank": "The launcher of several processes sets it.",
}
"""Fields that tokenward sets, and what to write instead."""

_FIRST_PROCESS = "the first process of a run writes and logs for all"
_DATA_PARALLEL = (
    "several processes share the data (DDP, FSDP2, DeepSpeed), not the rows or the layers of a model"
)
_NO_PREDICTIONS = "evaluation during training keeps losses, not predictions"
_FULL_EVAL = "evaluation during training uses the data type of training. Write {} instead"
_HUB = "a run uploads nothing. Export the model (tokenward export RUN FOLDER), then upload the folder (hf upload NAME FOLDER)"

_IN_SCRIPTS_TOO = {
    "label_smoothing_factor": "the objective computes the loss. Use label_smoothing of the objective, if it has it",
    **dict.fromkeys(
        ("use_liger_kernel", "liger_kernel_config"),
        "it replaces the model's layers, and tokenward's own head already avoids storing logits",
    ),
    "neftune_noise_alpha": "its noise depends on the row layout, so policy and reference would differ at the start",
    "torch_empty_cache_steps": "tokenward's training step ignores it. Lower tokens_per_forward to save memory",
    "auto_find_batch_size": "it would change the update. Lower tokens_per_forward, which saves memory without changing it",
    **dict.fromkeys(
        ("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics"),
        _NO_PREDICTIONS,
    ),
    "length_column_name": "rows have no such column; batches are already grouped by length (tokens_per_forward)",
}  # fmt: skip

CANNOT_ACT_IN_SCRIPT = {
    **_IN_SCRIPTS_TOO,
    "parallelism_config": _DATA_PARALLEL,
    "include_num_input_tokens_seen": "the speed callback counts tokens, and rows have no input_ids column",
    "label_names": "labels are made from the responses",
}
"""Fields that must keep their defaults in a script, where processes, uploads and checkpoints are the user's own."""

CANNOT_ACT = {
    **_IN_SCRIPTS_TOO,
    **dict.fromkeys(
        ("log_on_each_node", "log_level_replica", "save_on_each_node"), _FIRST_PROCESS
    ),
    "average_tokens_across_devices": "the denominator of a step always counts all processes",
    "parallelism_config": _DATA_PARALLEL,
    "accelerator_config": "tokenward counts rows by accelerate's default settings",
    "bf16_full_eval": _FULL_EVAL.format("bf16"),
    "fp16_full_eval": _FULL_EVAL.format("fp16"),
    "use_cache": "training reads whole rows and needs no cache",
    "include_num_input_tokens_seen": "the manifest and the log already count tokens",
    "save_only_model": "a stopped run could not resume from such a checkpoint. Lower save_total_limit to keep fewer",
    "enable_jit_checkpoint": "training would stop early and count as finished. Ctrl-C writes a checkpoint",
    "ignore_data_skip": "a resumed run would skip rows that it has not seen",
    "restore_callback_states_from_checkpoint": "no callback of a run has such a state",
    **dict.fromkeys(
        ("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"), _HUB
    ),
    "skip_memory_metrics": "the manifest already has the memory",
}  # fmt: skip
"""Fields that must keep their defaults in a recipe, each with the reason."""


_Condition = Callable[[Mapping[str, Any]], bool]


def _equals(key: str, value: str, default: str = "no") -> _Condition:
    return lambda table: table.get(key, default) == value


def _evaluates(table: Mapping[str, Any]) -> bool:
    return table.get("eval_strategy", "no") != "no"


def _needs_metric(table: Mapping[str, Any]) -> bool:
    adaptive = table.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy")
    return bool(table.get("load_best_model_at_end")) or table.get("save_strategy") == "best" or adaptive


def _checkpoints(table: Mapping[str, Any]) -> bool:
    return bool(table.get("gradient_checkpointing") or table.get("activation_checkpointing"))


def trackers_of(table: Mapping[str, Any]) -> list[str]:
    """The trackers that a ``training`` table names."""
    value = table.get("report_to") or "none"
    return [name for name in ([value] if isinstance(value, str) else value) if name != "none"]


EVALUATION = ("eval_delay", "eval_on_start", "per_device_eval_batch_size")
_TRACKIO = ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
_WORKERS = (
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context",
    "dataloader_in_order",
)
BESIDE: dict[str, tuple[_Condition, str]] = {
    "eval_steps": (_equals("eval_strategy", "steps"), "eval_strategy: steps"),
    **dict.fromkeys(EVALUATION, (_evaluates, "eval_strategy: steps or epoch")),
    "load_best_model_at_end": (
        _evaluates,
        "eval_strategy and save_strategy: steps or epoch, and metric_for_best_model",
    ),
    **dict.fromkeys(
        ("metric_for_best_model", "greater_is_better"),
        (_needs_metric, "load_best_model_at_end: true, or save_strategy: best"),
    ),
    "fsdp_config": (lambda table: bool(table.get("fsdp")), "fsdp: true"),
    "save_steps": (_equals("save_strategy", "steps"), "save_strategy: steps"),
    "logging_steps": (_equals("logging_strategy", "steps", "steps"), "logging_strategy: steps"),
    "warmup_steps": (
        lambda table: table["lr_scheduler_type"] != "constant",
        "lr_scheduler_type: constant_with_warmup, linear or another schedule with warm-up",
    ),
    "gradient_checkpointing_kwargs": (_checkpoints, "gradient_checkpointing: true"),
    "activation_checkpointing_kwargs": (_checkpoints, "activation_checkpointing: true"),
    **dict.fromkeys(
        _WORKERS,
        (lambda table: bool(table.get("dataloader_num_workers")), "dataloader_num_workers: 1 or more"),
    ),
    "run_name": (lambda table: bool(trackers_of(table)), "report_to: wandb or another tracker"),
    "logging_dir": (
        lambda table: not {"tensorboard", "all"}.isdisjoint(trackers_of(table)),
        "report_to: tensorboard",
    ),
    **dict.fromkeys(
        _TRACKIO, (lambda table: not {"trackio", "all"}.isdisjoint(trackers_of(table)), "report_to: trackio")
    ),
}
"""Fields that only have an effect with another one: whether the table has it, and what to write."""

BY_OPTIMIZER = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "optim_target_modules")
"""Fields that only some optimizers read; :mod:`tokenward.training.arguments` checks the recipe's."""

_AT_LEAST = {
    "learning_rate": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
}


def check_training(
    table: Mapping[str, Any],
    where: str,
    lines: Lines,
    *,
    schedule: str = "linear",
    always_evaluates: bool = False,
) -> None:
    """Refuse unknown fields, values of a wrong type and fields that have no effect in a recipe.

    Args:
        table: The ``training`` table.
        where: Its dotted path in the recipe, such as ``oracle.training``.
        lines: Where the recipe's keys were written.
        schedule: The default of ``lr_scheduler_type`` in this table.
        always_evaluates: Whether evaluations happen without an ``eval_strategy``, as for the reward of an online run.

    Raises:
        UserError: names every such field, with its line and what is allowed.
    """
    # Imports torch, which help and `tokenward config` must not wait for.
    from tokenward.training.arguments import TokenTrainingArguments

    names = [f.name for f in dataclasses.fields(TokenTrainingArguments) if f.init and f.name not in OURS]
    hints = {
        **get_type_hints(TokenTrainingArguments),
        "fsdp": bool | str | None,
    }  # transformers' own says text only
    problems = [
        *(_wrong(f"{where}.{key}", value, hints[key]) for key, value in table.items() if key in names),
        *(_unknown(key, where, names) for key in table if key not in names),
    ]
    if not any(problems):
        whole = {"lr_scheduler_type": schedule, **table}
        defaults = _defaults(TokenTrainingArguments)
        written = {key: value for key, value in table.items() if value != defaults[key]}
        ignored = ("eval_steps", *EVALUATION) if always_evaluates else ()
        problems = [*_idle(where, [key for key in written if key not in ignored], whole)]
    found = [problem for problem in problems if problem]
    if found:
        order = [f"{where}.{key}" for key in table]
        raise refusal(sorted(found, key=lambda problem: order.index(problem.key)), lines.where)


def _idle(where: str, written: list[str], table: Mapping[str, Any]) -> Iterator[Problem]:
    for key in written:
        if key in CANNOT_ACT:
            message = f"{key} has no effect in a recipe: {CANNOT_ACT[key]}. Remove it."
            yield Problem(f"{where}.{key}", message, "unused-key")
        elif key in BESIDE and not BESIDE[key][0](table):
            message = (
                f"{key} only has an effect with {BESIDE[key][1]}. Add that to this table, or remove {key}."
            )
            yield Problem(f"{where}.{key}", message, "unused-key")


def _defaults(arguments: type) -> dict[str, Any]:
    fields = dataclasses.fields(arguments)
    made = {f.name: f.default_factory() for f in fields if f.default_factory is not dataclasses.MISSING}
    return {f.name: f.default for f in fields} | made


def _wrong(key: str, value: Any, hint: Any) -> Problem | None:
    """What is wrong with a value, if anything. TrainingArguments itself checks hardly any type."""
    least = _AT_LEAST.get(key.rpartition(".")[2])
    annotation: Any = _words_only(hint) if least is None else Annotated[hint, Field(ge=least)]
    if _fits(value, annotation):
        return None
    problem = wrong_value(key, value, FieldInfo.from_annotation(annotation))
    if value is not None:
        return problem
    return problem._replace(message=f"{problem.message} Remove it to use the default.")


def _words_only(hint: Any) -> Any:
    """The enumeration of a hint such as ``Enum | str``: other text is not understood."""
    enums = [kind for kind in get_args(hint) if isinstance(kind, type) and issubclass(kind, Enum)]
    return enums[0] if enums else hint


def _fits(value: Any, annotation: Any) -> bool:
    adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    is_enum = isinstance(annotation, type) and issubclass(annotation, Enum)
    try:
        adapter.validate_python(value, strict=not is_enum)  # a recipe writes members as text
    except ValidationError:
        return False
    return True


def _unknown(key: str, where: str, names: list[str]) -> Problem:
    path = f"{where}.{key}"
    if key in OURS:
        message = f"tokenward sets {key} itself, so it cannot be in {where}. {OURS[key]}"
        return Problem(path, message, "reserved-key")
    close = either([repr(name) for name in nearest(key, names)])
    advice = trl_advice(key, recipe=True) or (
        f"Did you mean {close}?" if close else "See transformers.TrainingArguments."
    )
    return Problem(path, f"unknown key '{key}' in {where}. {advice}", "unknown-key")
