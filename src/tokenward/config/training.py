"""A ``training`` table against the fields of transformers.TrainingArguments."""

import dataclasses
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, get_args, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from tokenward.config.problems import either, nearest, wrong_value
from tokenward.config.source import Lines
from tokenward.config.training_fields import OURS, idle_fields
from tokenward.errors import UserError

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
