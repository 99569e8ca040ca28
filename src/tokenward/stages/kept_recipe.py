"""The recipe as an evaluation found it: every key, also those that no stage's manifest has."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenward.artifacts import Manifest, atomic_write, read_manifest
from tokenward.stages.run import AUXILIARY, ONLINE_STAGES, STAGES, Run

RECIPE = "recipe.json"
"""In the folder of the evaluation."""


def keep_recipe(run: Run, folder: Path) -> None:
    """Write the run's recipe into a folder, with every default of its tables."""
    found = run.recipe.model_dump(mode="json")
    atomic_write(folder / RECIPE, json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def changes_of(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """How two recipes differ, such as ``policy.objective.gamma: 2 -> 1``; where a run lies is no difference."""
    before, after = (
        Manifest.begin("recipe", {key: value for key, value in recipe.items() if key != "run"}, {}, 1)
        for recipe in (first, second)
    )
    return before.changes_to(after)


def recipes_kept(folders: tuple[Path, Path]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The recipes of two runs; None where one was evaluated before recipes were kept."""
    files = [folder / "evaluation" / RECIPE for folder in folders]
    if not all(file.is_file() for file in files):
        return None
    first, second = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    return first, second


def stages_of(folder: Path) -> list[str]:
    """Stages that a run's result was made by, in their order: auxiliary models only where a scorer, or a pick, read them."""
    names = [name for name in dict.fromkeys((*STAGES, *ONLINE_STAGES)) if _manifest(folder, name)]
    auxiliary: list[str] = []
    left = ["scores"]
    while left:
        manifest = _manifest(folder, left.pop())
        inputs = manifest.inputs if manifest else {}
        found = [name for name in inputs if name.startswith(AUXILIARY) and name not in auxiliary]
        auxiliary, left = [*auxiliary, *found], [*left, *found]
    place = names.index("scores") if "scores" in names else len(names)
    return [*names[:place], *sorted(auxiliary), *names[place:]]


def _manifest(folder: Path, stage: str) -> Manifest | None:
    path = folder / stage
    return read_manifest(path) if (path / "manifest.json").is_file() else None
