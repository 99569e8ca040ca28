"""What the folder of a finished run holds: its recipe, its stages and its model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenward.artifacts import MANIFEST, Manifest, read_json, read_manifest, require, user_path
from tokenward.errors import UserError
from tokenward.models.loading import LanguageModel, load_model
from tokenward.stages.evaluation import RECIPE
from tokenward.stages.lists import NAMES, RESULTS
from tokenward.stages.run import AUXILIARY
from tokenward.tokens.template import Style


class FinishedModel(NamedTuple):
    """A model by its folder or hub name, with the run that trained it, if any, and the facts in the manifest of its stage."""

    name: str
    run: Path | None
    facts: dict[str, Any]

    @property
    def style(self) -> Style:
        """How its prompts are written."""
        return Style.of_facts(self.facts)

    @property
    def start(self) -> str | None:
        """The model that it was trained from, if known."""
        return self.facts.get("start")

    def load(self, name: str | None = None) -> LanguageModel:
        """Load the model, or another one with the same settings."""
        settings = {key: self.facts[key] for key in ("dtype", "attention") if key in self.facts}
        return load_model(name or self.name, **settings)


def finished_model(target: str) -> FinishedModel:
    """The model of a run's folder, a stage's folder, a model folder or a hub name.

    Raises:
        UserError: the run or the stage has not finished, or the stage trains no language model.
    """
    folder = user_path(target)
    if (folder / MANIFEST).is_file():
        stage = read_manifest(folder).stage
        manifest = require(folder, stage)
        manifest.check_files(folder)  # before weights are loaded that are not those of the run
        facts = manifest.facts
        if not (folder / "model").is_dir():
            raise UserError(
                f"{folder} is the folder of the stage {stage}, which trains no model. Name the folder of the run: "
                f"{folder.parent}.",
                code="not-a-model",
            )
        return FinishedModel(str(folder / "model"), folder.parent, facts)
    if (folder.parent / MANIFEST).is_file() and folder.name == "model":
        return finished_model(str(folder.parent))
    if any((folder / stage).is_dir() for stage in NAMES):
        return finished_model(str(folder / trained_stage(folder)))
    return FinishedModel(target, None, {})


def run_folder(name: str | Path) -> Path:
    """The folder of a run, given that folder or the folder of one of its stages.

    Raises:
        UserError: there is no run.
    """
    folder = user_path(name)
    for place in (folder, folder.parent):
        if any((place / stage / MANIFEST).is_file() for stage in NAMES):
            return place
    raise UserError(
        f"{name} is not the folder of a run. Name a folder that `tokenward run` made, such as runs/quickstart.",
        code="not-a-run",
    )


def trained_stage(folder: Path) -> str:
    """The stage whose model is the result of a run.

    Raises:
        UserError: it has not finished.
    """
    stage = next((name for name in RESULTS if (folder / name).is_dir()), RESULTS[-1])
    require(folder / stage, stage)
    return stage


def run_manifests(folder: Path) -> dict[str, Manifest]:
    """Manifests of the stages behind a run's result, in order. Auxiliary models count only if a scorer reads them."""
    every = {file.parent.name: read_manifest(file.parent) for file in folder.glob(f"*/{MANIFEST}")}
    read, waiting = set[str](), ["scores"] if "scores" in every else []
    while waiting:
        # An auxiliary model may have been trained on a subset that another auxiliary model selected.
        inputs = every[waiting.pop()].inputs
        found = {name for name in inputs if name.startswith(AUXILIARY) and name in every} - read
        read |= found
        waiting += found
    place = NAMES.index("scores")
    order = [*NAMES[:place], *sorted(read), *NAMES[place:]]
    return {name: every[name] for name in order if name in every}


def recipe_changes(folders: Sequence[Path]) -> list[str]:
    """How the recipes of two evaluated runs differ, such as ``policy.objective.gamma: 2 -> 1``.

    The key ``run``, the folder of a run, does not count as a difference.

    Raises:
        UserError: an evaluation of an older version holds no recipe.
    """
    files = [folder / "evaluation" / RECIPE for folder in folders]
    for file in files:
        if not file.is_file():
            raise UserError(
                f"{file} is missing, so the recipes cannot be compared. Delete {file.parent} and run "
                "`tokenward evaluate RECIPE` again.",
                code="missing-file",
            )
    before, after = (_without_folder(read_json(file)) for file in files)
    return before.changes_to(after)


def _without_folder(recipe: Mapping[str, Any]) -> Manifest:
    return Manifest.begin("recipe", {key: value for key, value in recipe.items() if key != "run"}, {}, 1)
