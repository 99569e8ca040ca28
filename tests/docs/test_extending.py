"""The classes of docs/extending.md, in one file and named by the recipes beside them, carry a whole run."""

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


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Tables joined key by key; objects (tables with a name) replaced."""
    both = dict(first)
    for key, value in second.items():
        old = both.get(key)
        tables = isinstance(value, dict) and isinstance(old, dict) and "name" not in value
        both[key] = merged(old, value) if tables else value
    return both


def test_each_example_is_short() -> None:
    examples = blocks("python")
    assert len(examples) == 5
    for example in examples:
        assert len([line for line in example.splitlines() if line.strip()]) < 15, example


def test_the_examples_carry_a_run(tiny_workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mylab", raising=False)  # another test of this process may have one
    Path("mylab.py").write_text("\n\n".join(blocks("python")))
    recipe = yaml.safe_load(tiny_workplace.read_text())
    for block in blocks("yaml"):
        recipe = merged(recipe, yaml.safe_load(block))
    tiny_workplace.write_text(yaml.safe_dump(recipe))

    run = tokenward.run(tiny_workplace, quiet=True)

    (part,) = run.recipe.scores.scorer.arguments["parts"]
    assert part == {"scorer": {"name": "mylab:Late"}, "steps": [{"mylab:Shrink": {"by": 0.5}}]}
    assert run.recipe.policy.selection.arguments == {"temperature": 0.5}
    assert run.recipe.policy.objective.name == "mylab:Hinge"
    assert not run.path("oracle").exists(), "the scorer reads no oracle, so none is trained"
    assert tokenward.read_figures(run)["mylab:shout/after"].n == 4
