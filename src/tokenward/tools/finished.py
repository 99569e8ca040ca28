"""The model that a run has made: where it is, what it started from, how it was held."""

from pathlib import Path
from typing import Any, NamedTuple

from tokenward.artifacts import MANIFEST, read_manifest, require
from tokenward.errors import UserError
from tokenward.models.loading import LanguageModel, load_model
from tokenward.stages.lists import NAMES
from tokenward.tokens.template import Style
from tokenward.tools.kept import trained_stage


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
