"""Workplaces of online runs."""

from pathlib import Path

import pytest

from tests.stages.runs import PROMPTS, online_recipe


@pytest.fixture
def recipe(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder is one with an online recipe on examples."""
    made = online_recipe(tmp_path / "work", tiny_folder)
    monkeypatch.chdir(made.parent)
    return made


@pytest.fixture
def prompts(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder is one with a recipe that learns prompts."""
    made = online_recipe(tmp_path / "work", tiny_folder, PROMPTS)
    monkeypatch.chdir(made.parent)
    return made
