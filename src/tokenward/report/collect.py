"""What a run's folder holds, read as plain values: manifests, figures, replies, histories."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenward.artifacts import MANIFEST, Manifest, read_json, read_jsonl, read_manifest
from tokenward.errors import UserError
from tokenward.evaluation.statistics import Figures, load_figures

TOKENIZER_FOLDERS = ("policy", "oracle", "reward", "online")


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run as its folder tells it.

    Attributes:
        path: The folder.
        manifests: Of every finished stage, by name, in the order in which they were begun.
    """

    path: Path
    manifests: Mapping[str, Manifest]

    @classmethod
    def read(cls, path: str | Path) -> "RunFolder":
        """Read the manifests of a run's stages.

        Raises:
            UserError: the folder is not there, or holds no finished stage.
        """
        path = Path(path)
        found = [read_manifest(file.parent) for file in sorted(path.glob(f"*/{MANIFEST}"))]
        done = sorted((manifest for manifest in found if manifest.complete), key=lambda item: item.created)
        if not path.is_dir():
            raise UserError(
                f"{path} is no folder here. Name the folder of a run, such as runs/quickstart; tokenward run RECIPE makes one."
            )
        if not done:
            raise UserError(
                f"{path} holds no finished stage of a run, so there is nothing to report. Name the folder of a run, "
                "such as runs/quickstart, or run the recipe first: tokenward run RECIPE."
            )
        return cls(
            path=path, manifests={manifest.stage: manifest for manifest in [*_of_rows(path, done), *done]}
        )

    def setting(self, stage: str, *keys: str) -> Any:
        """A setting that a stage's manifest holds; None where the stage or the setting is not there."""
        value: Any = self.manifests[stage].settings if stage in self.manifests else None
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    @property
    def seed(self) -> int:
        """The recipe's seed."""
        seeds = (self.setting(stage, "seed") for stage in self.manifests)
        return int(next((seed for seed in seeds if seed is not None), 0))

    def stale(self) -> list[str]:
        """Stages that were made from something else than what the folder holds now, a sentence each."""
        return [
            f"{name} was made from another {other} than the one that the folder holds now; run the recipe again."
            for name, manifest in self.manifests.items()
            for other, fingerprint in manifest.inputs.items()
            if other in self.manifests and self.manifests[other].fingerprint != fingerprint
        ]

    def figures(self) -> Figures:
        """The figures of the evaluation; none where it has not run."""
        path = self.path / "evaluation" / "metrics.json"
        if "evaluation" not in self.manifests or not path.is_file():
            return {}
        return load_figures(path)

    def replies(self) -> list[dict[str, Any]]:
        """Replies before and after training, as the evaluation wrote them."""
        return self._lines("evaluation", "samples.jsonl")

    def watched(self) -> dict[str, list[dict[str, Any]]]:
        """Replies to the fixed prompts while a stage trained, one look at one prompt an entry, by stage."""
        found = {name: self._lines(name, "samples.jsonl") for name in self.manifests if name != "evaluation"}
        return {name: lines for name, lines in found.items() if lines}

    def prompts(self) -> dict[str, Any]:
        """The learned prompts of a classification task; empty where there are none."""
        path = self.path / "evaluation" / "prompts.json"
        return read_json(path) if path.is_file() else {}

    def histories(self) -> dict[str, list[dict[str, Any]]]:
        """What each training stage logged, one step an entry."""
        found = {name: self._lines(name, "history.jsonl") for name in self.manifests}
        return {name: entries for name, entries in found.items() if entries}

    def events(self) -> list[dict[str, Any]]:
        """What happened in the turns of an online run."""
        return self._lines("online", "events.jsonl")

    def special_names(self) -> dict[int, str]:
        """Names of the tokens that are no text, by id, from the tokenizer that a trained model was saved with."""
        for stage in TOKENIZER_FOLDERS:
            path = self.path / stage / "model" / "tokenizer.json"
            if path.is_file():
                added = read_json(path).get("added_tokens", [])
                return {int(token["id"]): str(token["content"]) for token in added}
        return {}

    def _lines(self, stage: str, name: str) -> list[dict[str, Any]]:
        path = self.path / stage / name
        if stage not in self.manifests or not path.is_file():
            return []
        return read_jsonl(path)


def _of_rows(path: Path, stages: list[Manifest]) -> list[Manifest]:
    """Manifests of the ids and the pairs that the run's scores belong to."""
    pairs = next((found.inputs["pairs"] for found in stages if found.stage == "reference"), "")
    if not (path / "pairs" / pairs / MANIFEST).is_file():
        return []
    found = read_manifest(path / "pairs" / pairs)
    return [read_manifest(path / "encoded" / found.inputs["encoded"]), found]


FALLEN = "the chosen responses became less likely during training"


def displacement(run: RunFolder) -> str:
    """What the run says of displaced mass, in words; empty where the chosen responses did not lose likelihood.

    What the alarm of the training saw comes first; without it the evaluation's figure on held-out pairs decides where
    there is one; else the policy's own log.
    """
    noted = run.manifests["policy"].facts.get("displacement", {}) if "policy" in run.manifests else {}
    if noted.get("warned_at") is not None:
        return (
            f"Displacement: {FALLEN}. The alarm went off at update {noted['warned_at']}, {noted['margin']:g} nats a token below the "
            f"start; at the end their selected tokens were at {noted['last']:+.2f}. Look at the replies below before trusting the "
            "margin."
        )
    figure = run.figures().get("logps/chosen_change_per_token")
    if figure is not None:
        if not figure.high < 0:
            return ""
        return (
            f"Displacement: {FALLEN}. On {figure.n} held-out pairs their log-probability changed by {figure.value:.3f} nats a "
            f"token (95 % interval {figure.low:.3f} to {figure.high:.3f}). The policy moved its mass to other replies; look at "
            "the replies below before trusting the margin."
        )
    return _from_history(run.histories().get("policy", []))


def _from_history(entries: list[dict[str, Any]]) -> str:
    logged = [entry["logps/chosen"] for entry in entries if "logps/chosen" in entry]
    part = len(logged) // 4
    if not part:
        return ""
    before, after = (sum(side) / part for side in (logged[:part], logged[-part:]))
    if after >= before:
        return ""
    return (
        f"Displacement: {FALLEN}, as its log says: their selected tokens' log-probability went from {before:.2f} (mean of the "
        f"first quarter of the log) to {after:.2f} nats (of the last)."
    )
