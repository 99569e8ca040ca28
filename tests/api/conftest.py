"""The oracle of the tiny quick start, trained through the library."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments

import tokenward
from tests.tiny import planted_rows
from tokenward.data.prepare import from_rows
from tokenward.data.split import is_eval

TOKENS = tokenward.TokenSettings(max_prompt_tokens=128, max_response_tokens=64)


def arguments(folder: Path, steps: int, **more: Any) -> TrainingArguments:
    """The training table of the recipe, as a script writes it."""
    settings: dict[str, Any] = {
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "max_steps": steps,
        "warmup_steps": 0.1,
        "seed": 0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(folder), **{**settings, **more})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The saved weights of a model, or of its adapter."""
    return load_file(next(folder.glob("*model.safetensors")))


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


class Script(NamedTuple):
    """The model folder, the recipe's split, the trained oracle, and the folder with everything that was saved."""

    model: str
    train: list[dict[str, Any]]
    eval: list[dict[str, Any]]
    oracle: tokenward.TokenScorer
    folder: Path

    def load(self) -> Any:
        """The model, loaded by transformers."""
        return AutoModelForCausalLM.from_pretrained(self.model)


@pytest.fixture(scope="session")
def script(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Script:
    """The oracle of the tiny quick start, by the library."""
    folder, rows = tmp_path_factory.mktemp("script"), planted_rows(24)
    held = [is_eval(row, 0.3, 0) for row in from_rows(rows, name="rows").comparisons]
    train, other = (
        [row for row, own in zip(rows, held, strict=True) if own is side] for side in (False, True)
    )
    oracle = tokenward.train_oracle(
        str(tiny_folder), train, args=arguments(folder / "oracle", 6), eval_dataset=other, tokens=TOKENS
    )
    return Script(str(tiny_folder), train, other, oracle, folder)
