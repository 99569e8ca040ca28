"""What a finished run's folder says: its recipe, its stages and its model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenward.artifacts import MANIFEST, Manifest, read_json, read_manifest, require
from tokenward.errors import UserError
from tokenward.models.loading import LanguageModel, load_model
from tokenward.stages.evaluation import RECIPE
from tokenward.stages.lists import NAMES, RESULTS
from tokenward.stages.run import AUXILIARY
from tokenward.tokens.template import Style


class FinishedModel(NamedTuple):
    """A model to talk to or to give away.

    Attributes:
        name: Its folder, or a hub name.
        run: Folder of the run that made it, or None.
        facts: What its stage says of it; empty where no run made it.
    """

    name: str
    run: Path | None
    facts: dict[str, Any]

    @property
    def style(self) -> Style:
        """How its prompts are written."""
        return Style.of_facts(self.facts)

    @property
    def start(self) -> str | None:
        """What it was trained from, where that is known."""
        return self.facts.get("start")

    def load(self, name: str | None = None) -> LanguageModel:
        """The model, or another one held in the same way."""
        settings = {key: self.facts[key] for key in ("dtype", "attention") if key in self.facts}
        return load_model(name or self.name, **settings)


def finished_model(target: str) -> FinishedModel:
    """The model behind a run's folder, a stage's folder, a model folder or a hub name.

    Raises:
        UserError: the run or the stage has not finished, or the stage makes no language model.
    """
    folder = Path(target).expanduser()
    if (folder / MANIFEST).is_file():
        stage = read_manifest(folder).stage
        require(folder, stage)
        if not (folder / "model").is_dir():
            raise UserError(
                f"{folder} holds the stage {stage}, which makes no model. Name the run's folder, {folder.parent}."
            )
        return FinishedModel(str(folder / "model"), folder.parent, read_manifest(folder).facts)
    if (folder.parent / MANIFEST).is_file() and folder.name == "model":
        return finished_model(str(folder.parent))
    if any((folder / stage).is_dir() for stage in NAMES):
        return finished_model(str(folder / trained_stage(folder)))
    return FinishedModel(target, None, {})


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
