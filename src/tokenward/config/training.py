"""A ``training`` table against the fields of transformers.TrainingArguments."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tokenward.config.problems import either, nearest
from tokenward.config.source import Lines
from tokenward.errors import UserError

_OURS = {
    "output_dir": "It is the stage's folder; set run to move the whole run.",
    "remove_unused_columns": "The columns of a comparison are not the model's arguments.",
    "label_names": "Labels are made from the responses.",
    "resume_from_checkpoint": "The same command goes on from a stage's own checkpoint.",
    "do_train": "A stage that has a training table trains.",
    "do_eval": "Write eval_strategy to evaluate while training.",
    "do_predict": "The evaluation stage samples replies.",
}


def check_training(table: Mapping[str, Any], where: str, lines: Lines) -> None:
    """Refuse keys that TrainingArguments lacks or that tokenward sets itself.

    Args:
        table: the ``training`` table.
        where: its dotted path in the recipe, such as ``oracle.training``.
        lines: where the recipe's keys were written.

    Raises:
        UserError: for every such key, with its line and the nearest field.
    """
    from tokenward.training.arguments import (
        TrainingArguments,  # it imports torch, which help and `config` must not wait for
    )

    names = [f.name for f in dataclasses.fields(TrainingArguments) if f.init and f.name not in _OURS]
    problems = [
        f"{lines.where(f'{where}.{key}')}: {_problem(key, where, names)}" for key in table if key not in names
    ]
    if problems:
        raise UserError("\n".join(problems))


def _problem(key: str, where: str, names: list[str]) -> str:
    if key in _OURS:
        return f"tokenward sets '{key}' itself, so it cannot stand in {where}. {_OURS[key]}"
    close = nearest(key, names)
    advice = (
        f"Did you mean {either([repr(name) for name in close])}?"
        if close
        else "See transformers.TrainingArguments."
    )
    return f"unknown key '{key}' in {where}. {advice}"
