"""What only a library or the machine can judge: single values of a recipe, each refused with its own line."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tokenward.config import Recipe
from tokenward.errors import UserError
from tokenward.sampling.classification import PromptTemplate
from tokenward.stages.examples import prompt_parts
from tokenward.stages.run import Run
from tokenward.stages.starts import check_start


def early_checks(run: Run) -> dict[str, Callable[[], Any]]:
    """Checks by the dotted key that they are about."""
    checks: dict[str, Callable[[], Any]] = {"model.device": lambda: _device(run.recipe.model.device)}
    for key, name in _starts(run.recipe).items():
        trust = run.recipe.model.trust_remote_code
        checks[key] = partial(check_start, name, trust_remote_code=trust)
    examples, task = run.recipe.examples, run.recipe.prompt_task
    if examples is not None:
        checks["examples.prompt"] = lambda: _prompt(examples.prompt)
    if task is not None:
        checks["prompt_task.template"] = lambda: PromptTemplate(task.template)
    return checks


def _starts(recipe: Recipe) -> dict[str, str]:
    """The models that something trains from, by their keys; auxiliary models have checks of their own."""
    tables = {
        "model": recipe.model.name,
        "oracle": recipe.oracle.model,
        "reward": recipe.reward.model,
        "policy": recipe.policy.model,
    }
    return {
        f"{table}.{'name' if table == 'model' else 'model'}": name for table, name in tables.items() if name
    }


def check_one_process() -> None:
    """Refuse a run in several processes: each would want the same folders.

    Raises:
        UserError: torchrun or accelerate launch started this process beside others.
    """
    processes = os.environ.get("WORLD_SIZE", "1")  # of torchrun and accelerate launch
    if processes not in ("", "1"):
        raise UserError(
            f"a run works in one process, and this is one of {processes}. Start tokenward itself, without torchrun or "
            "accelerate launch."
        )


def _device(name: str) -> None:
    kind = name.partition(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"model.device is {name}, and torch sees no CUDA device on this machine. Write model.device: auto, which takes a "
            "GPU where there is one, or cpu."
        )


def _prompt(template: str) -> None:
    if all(column is None for _, column in prompt_parts(template)):
        raise UserError(
            f"examples.prompt is {template!r}, which names no column of the data, so every prompt would be the same. Write the "
            'column in braces, such as prompt: "Summarize: {article}".'
        )
