"""Fixtures that the tests and the code blocks of the documentation share."""

import contextlib
import gc
import shutil
from pathlib import Path

import pytest
import torch

from tests.tiny import make_workplace, save_tiny

# The models are so small that a second thread costs more than it brings.
torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _cheap_collection() -> None:
    """What is loaded by now is no garbage: a training looks through all of it several times, which took most of its time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny Llama with its tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


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
