"""What a finished run's folder tells of its recipe and its stages."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenward.artifacts import MANIFEST, Manifest, read_json, read_manifest, require
from tokenward.errors import UserError
from tokenward.stages.evaluation import RECIPE
from tokenward.stages.lists import NAMES, RESULTS
from tokenward.stages.run import AUXILIARY


def run_folder(name: str | Path) -> Path:
    """A run's folder, named by itself or by the folder of one of its stages.

    Raises:
        UserError: there is no run.
    """
    folder = Path(name).expanduser()
    for place in (folder, folder.parent):
        if any((place / stage / MANIFEST).is_file() for stage in NAMES):
            return place
    raise UserError(
        f"{name} is not the folder of a run. Name one that `tokenward run` made, such as runs/quickstart."
    )


def trained_stage(folder: Path) -> str:
    """The stage of a run whose model is its result.

    Raises:
        UserError: it has not finished.
    """
    stage = next((name for name in RESULTS if (folder / name).is_dir()), RESULTS[-1])
    require(folder / stage, stage)
    return stage


def stages_of(folder: Path) -> list[str]:
    """Stages that a run's result was made by, in their order; auxiliary models only if a scorer, or a subset, read them."""
    names = [name for name in NAMES if stage_manifest(folder, name)]
    auxiliary: list[str] = []
    left = ["scores"]
    while left:
        manifest = stage_manifest(folder, left.pop())
        inputs = manifest.inputs if manifest else {}
        found = [name for name in inputs if name.startswith(AUXILIARY) and name not in auxiliary]
        auxiliary, left = [*auxiliary, *found], [*left, *found]
    place = names.index("scores") if "scores" in names else len(names)
    return [*names[:place], *sorted(auxiliary), *names[place:]]


def stage_manifest(folder: Path, stage: str) -> Manifest | None:
    """The manifest of a run's stage; None if it has none."""
    path = folder / stage
    return read_manifest(path) if (path / MANIFEST).is_file() else None


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
    first, second = map(read_json, files)
    return first, second
