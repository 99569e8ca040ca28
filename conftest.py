"""Fixtures that the tests and the code blocks of the documentation share."""

import contextlib
import gc
import json
import shutil
import sys
import warnings
from collections.abc import Generator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pytest_markdown_docs.plugin import MarkdownDocstringCodeModule
from werkzeug.serving import BaseWSGIServer

from tests.tiny import make_workplace, planted_rows, save_tiny

# The models are so small that a second thread costs more than it brings.
torch.set_num_threads(1)

# A test's server looks this often whether it shall stop. The default, half a second, was most of what such a test took.
BaseWSGIServer.serve_forever.__defaults__ = (0.01,)


SLOW = Path(__file__).parent / "tests" / "slow.txt"
"""Tests of more than two seconds on an idle core that show for more cases what others show for one: ``make test-all``."""


LONG = (
    "tests/real/",
    "tests/test_faults.py",
    "tests/training/test_engines.py",
    "tests/stages/",
    "tests/docs/",
    "tests/report/",
)
"""Where single tests take long. They come first, so that no worker is left alone with one of them at the end."""


@pytest.hookimpl(wrapper=True)
def pytest_collect_file() -> Generator[None, list[pytest.Collector], list[pytest.Collector]]:
    """Look for code blocks in pages only: their plugin would import every Python file a second time, 20 seconds in each worker."""
    found = yield
    return [item for item in found if not isinstance(item, MarkdownDocstringCodeModule)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files with long tests first, and mark the tests on the list as slow."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))
    slow = set(SLOW.read_text().splitlines())
    for item in items:
        if item.nodeid in slow:
            item.add_marker("slow")


_frozen: set[Path] = set()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What is loaded before a file's tests is no garbage: a training looks through all of it several times, which took most of its time."""
    if item.path not in _frozen:
        _frozen.add(item.path)
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


@pytest.fixture
def script_folder(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder has pairs and ranked lists as JSON lines, and the tiny model under a name of the hub."""
    ranked = [{key: row[key] for key in ("prompt", "responses", "scores")} for row in planted_rows(24)]
    pairs = [
        {"prompt": row["prompt"], "chosen": row["responses"][0], "rejected": row["responses"][2]}
        for row in ranked
    ]
    for name, rows in (("pairs", pairs), ("ranked", ranked)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "Qwen").mkdir()
    (tmp_path / "Qwen" / "Qwen2.5-0.5B-Instruct").symlink_to(tiny_folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A workplace in which the tiny quick start has run; copy it before changing it."""
    import tokenward

    recipe = make_workplace(tmp_path_factory.mktemp("finished") / "work", tiny_folder)
    with contextlib.chdir(recipe.parent.parent):
        tokenward.run(recipe, quiet=True)
    return recipe.parent.parent


@pytest.fixture(scope="session")
def finished_online(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A folder in which a small online run has ended in ``runs/online``; copy it before changing it."""
    from tests.stages.runs import LOOKS, online_recipe, run_online

    recipe = online_recipe(tmp_path_factory.mktemp("online") / "work", tiny_folder)
    with contextlib.chdir(recipe.parent):
        run_online(recipe, *LOOKS, last="evaluation")
    return recipe.parent


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


@pytest.fixture
def copied_online(finished_online: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished online run, which is the current folder; returns its recipe."""
    copy = tmp_path / "copy"
    shutil.copytree(finished_online, copy)
    monkeypatch.chdir(copy)
    return copy / "online.yaml"


@pytest.fixture
def trl(tmp_path: Path, tiny_oracle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL is there, its own warnings are no errors, and what it writes is gone with the test."""
    pytest.importorskip("trl")
    (tmp_path / "runs").symlink_to(tiny_oracle.parent.parent)
    monkeypatch.chdir(tmp_path)
    warnings.simplefilter("default")


@pytest.fixture
def verl(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the registries of ``verl.trainer.ppo.core_algos``."""
    names = ["verl", "verl.trainer", "verl.trainer.ppo", "verl.trainer.ppo.core_algos"]
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    policy_losses: dict[str, Any] = {}
    algorithms: Any = sys.modules[names[-1]]
    algorithms.register_adv_est = lambda name: lambda function: function
    algorithms.register_policy_loss = lambda name: lambda function: policy_losses.setdefault(name, function)
    algorithms.get_policy_loss_fn = policy_losses.__getitem__
