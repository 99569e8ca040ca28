"""The project that docs/extending.md builds works as written: its tests, its script and its recipe."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import tokenward

PAGE = Path(__file__).parent.parent.parent / "docs" / "extending.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


CLASSES = blocks("python")
*TESTS, SCRIPT = blocks("python notest")
RECIPE, WITH_STEP = map(yaml.safe_load, blocks("yaml"))


@pytest.fixture
def project(script_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delitem(sys.modules, "mylab", raising=False)  # another test of this process may have one
    monkeypatch.syspath_prepend(script_folder)
    importlib.invalidate_caches()
    Path("mylab.py").write_text("\n\n".join(CLASSES))
    return script_folder


def executed(text: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "page"}
    exec(text, names)
    return names


def test_each_class_is_short_and_passes_its_tests(project: Path) -> None:
    assert all(len([line for line in text.splitlines() if line.strip()]) < 15 for text in CLASSES)
    tests = [found for text in TESTS for name, found in executed(text).items() if name.startswith("test_")]
    assert len(tests) == 6
    for test in tests:
        test()


def test_the_script_and_the_recipe_work(project: Path) -> None:
    assert executed(SCRIPT)["figures"]["mylab:shout/change"].n == 5

    recipe = {**RECIPE, **WITH_STEP, "tokens": {"template": "plain"}}
    recipe["evaluation"] |= {"prompts": 4, "max_new_tokens": 4}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = tokenward.run("recipe.yaml", quiet=True)
    assert run.recipe.policy.objective.name == "mylab:Hinge"
    assert not run.path("oracle").exists(), "the scorer reads no oracle, so none is trained"
    assert "mylab:shout/after" in tokenward.read_figures(run)
