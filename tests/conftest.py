"""Fixtures that several test modules share."""

import contextlib
import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from tests.tiny import save_tiny

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny Llama with its tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


WORDS = ["the", "a", "tea", "cup", "on", "table", "was", "here", "and", "there"]


def planted_rows(count: int, seed: int = 0) -> list[dict]:
    """Comparisons of three replies in which the words good and bad decide, with their spans."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        replies, spans = [], []
        for word, value in (("good", 2.0), ("so", 0.0), ("bad", -2.0)):
            words = rng.choices(WORDS, k=rng.randint(3, 7))
            words.insert(rng.randint(0, len(words)), word)
            text = " ".join(words)
            start = text.split().index(word)
            begin = len(" ".join(text.split()[:start])) + (start > 0)
            replies.append(text)
            spans.append([[begin, begin + len(word), value]] if value else [])
        rows.append({"prompt": f"Say {number}.", "responses": replies, "scores": [1.0, 0.0, -1.0], "spans": spans})
    return rows


TINY_RECIPE = """
model: {{name: {model}}}
data: {{source: pairs.jsonl, held_out: 0.3}}
tokens: {{max_prompt_tokens: 128, max_response_tokens: 64}}
oracle:
  training: {{learning_rate: 1.0e-3, per_device_train_batch_size: 4, max_steps: 6}}
policy:
  objective: {{name: sepo, gamma: 2.0}}
  training: {{learning_rate: 1.0e-3, per_device_train_batch_size: 4, max_steps: 4}}
evaluation: {{prompts: 4, max_new_tokens: 6, bootstrap: 50, metrics: [vader]}}
"""


def make_workplace(folder: Path, model: Path, rows: int = 24) -> Path:
    """A folder with data and ``recipes/quickstart.yaml`` for the tiny model; returns the recipe."""
    (folder / "recipes").mkdir(parents=True)
    lines = [json.dumps(row) for row in planted_rows(rows)]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    recipe = folder / "recipes" / "quickstart.yaml"
    recipe.write_text(TINY_RECIPE.format(model=model))
    return recipe


@pytest.fixture
def tiny_workplace(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder is one with a tiny ``recipes/quickstart.yaml``; returns that recipe."""
    recipe = make_workplace(tmp_path / "work", tiny_folder)
    monkeypatch.chdir(recipe.parent.parent)
    return recipe


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A workplace in which the tiny quick start has run; copy it before changing it."""
    import tokenward

    recipe = make_workplace(tmp_path_factory.mktemp("finished") / "work", tiny_folder)
    with contextlib.chdir(recipe.parent.parent):
        tokenward.run(recipe, quiet=True)
    return recipe.parent.parent


@pytest.fixture
def tiny_oracle(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder is one in which the tiny quick start has run; to be read only."""
    monkeypatch.chdir(finished_run)
    return finished_run / "runs" / "quickstart" / "oracle"


@pytest.fixture
def copied_run(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished workplace, which is the current folder; returns its recipe."""
    copy = tmp_path / "copy"
    shutil.copytree(finished_run, copy)
    monkeypatch.chdir(copy)
    return copy / "recipes" / "quickstart.yaml"
