"""The contents of a run's folder as plain values: manifests, figures, replies, training logs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenward.artifacts import MANIFEST, Manifest, read_json, read_jsonl, read_manifest
from tokenward.errors import UserError
from tokenward.evaluation.statistics import Figures, load_figures
from tokenward.stages.lists import NAMES


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The folder of a run.

    Attributes:
        path: The folder.
        manifests: Manifests of the finished stages by name, in the order in which they started.
    """

    path: Path
    manifests: Mapping[str, Manifest]

    @classmethod
    def read(cls, path: str | Path) -> "RunFolder":
        """Read the manifests of a run's stages.

        Raises:
            UserError: the folder does not exist, or holds no finished stage.
        """
        path = Path(path)
        if not path.is_dir():
            raise UserError(
                f"there is no folder {path}. Name the folder of a run, such as runs/quickstart; `tokenward run RECIPE` makes one.",
                code="not-a-run",
            )
        found = [read_manifest(file.parent) for file in path.glob(f"*/{MANIFEST}")]
        done = sorted((item for item in found if item.complete), key=lambda item: (item.created, item.stage))
        if not done:
            raise UserError(
                f"{path} holds no finished stage of a run. Name the folder of a run, such as runs/quickstart, or run the "
                "recipe first: `tokenward run RECIPE`.",
                code="not-a-run",
            )
        manifests = [*_data_manifests(path, done), *done]
        return cls(path=path, manifests={manifest.stage: manifest for manifest in manifests})

    def setting(self, stage: str, *keys: str) -> Any:
        """A setting in a stage's manifest; None if the stage or the setting does not exist."""
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
        """One sentence for each stage that was made from other inputs than the folder holds now."""
        return [
            f"The stage {name} was made from an older version of {other} than this folder holds. Run the recipe again."
            for name, manifest in self.manifests.items()
            for other, fingerprint in manifest.inputs.items()
            if other in self.manifests and self.manifests[other].fingerprint != fingerprint
        ]

    def figures(self) -> Figures:
        """The figures of the evaluation; empty without an evaluation."""
        path = self.path / "evaluation" / "metrics.json"
        return load_figures(path) if "evaluation" in self.manifests and path.is_file() else {}

    def evaluated(self) -> Figures:
        """The figures of the evaluation.

        Raises:
            UserError: the run has no finished evaluation.
        """
        if not (figures := self.figures()):
            raise UserError(
                f"{self.path} has no finished evaluation, so there are no figures. Run the recipe to its end: `tokenward run RECIPE`.",
                code="not-evaluated",
            )
        return figures

    def lines(self, stage: str, name: str) -> list[dict[str, Any]]:
        """The lines of a stage's JSONL file; empty without that file."""
        path = self.path / stage / name
        return read_jsonl(path) if stage in self.manifests and path.is_file() else []

    def replies(self) -> list[dict[str, Any]]:
        """The evaluation's replies before and after training."""
        return self.lines("evaluation", "samples.jsonl")

    def histories(self) -> dict[str, list[dict[str, Any]]]:
        """The log of each training stage, one entry per logged step."""
        found = {name: self.lines(name, "history.jsonl") for name in self.manifests}
        return {name: entries for name, entries in found.items() if entries}

    def prompts(self) -> dict[str, Any]:
        """The learned prompts of a classification task; empty for other runs."""
        path = self.path / "evaluation" / "prompts.json"
        return read_json(path) if path.is_file() else {}

    def special_names(self) -> dict[int, str]:
        """Names of special tokens by id, from the tokenizer of the first trained model."""
        for stage in NAMES:
            path = self.path / stage / "model" / "tokenizer.json"
            if path.is_file():
                added = read_json(path).get("added_tokens", [])
                return {int(token["id"]): str(token["content"]) for token in added}
        return {}


def _data_manifests(path: Path, stages: list[Manifest]) -> list[Manifest]:
    """Manifests of the token ids and the pairs that the scores belong to."""
    pairs = next((found.inputs["pairs"] for found in stages if found.stage == "reference"), "")
    if not (path / "pairs" / pairs / MANIFEST).is_file():
        return []
    found = read_manifest(path / "pairs" / pairs)
    return [read_manifest(path / "encoded" / found.inputs["encoded"]), found]


_BEGIN = "The preferred responses of the data became less likely as well"
_END = (
    "This is common: preference training only widens the gap to the rejected responses. If the model is meant to write like the "
    "preferred responses, lower policy.training.learning_rate, or add an sft term to the objective."
)


def displacement(run: RunFolder) -> str:
    """A note if the chosen responses lost likelihood during training (displacement); otherwise empty.

    The training's own alarm comes first, then the evaluation's figure on eval pairs, then the log of the policy.
    """
    noted = run.manifests["policy"].facts.get("displacement", {}) if "policy" in run.manifests else {}
    if noted.get("warned_at") is not None:
        return (
            f"{_BEGIN}. From update {noted['warned_at']} on, their selected tokens were more than {noted['margin']:g} nats per token "
            f"below the start; at the end they were at {noted['last']:+.2f}. {_END}"
        )
    figure = run.figures().get("logps/chosen_change_per_token")
    if figure is None:
        return _displacement_in_log(run.lines("policy", "history.jsonl"))
    if not figure.high < 0:
        return ""
    return (
        f"{_BEGIN}: by {-figure.value:.3f} nats per token on {figure.n} eval pairs (95 % interval {-figure.high:.3f} to "
        f"{-figure.low:.3f}). {_END}"
    )


def _displacement_in_log(entries: list[dict[str, Any]]) -> str:
    logged = [entry["logps/chosen"] for entry in entries if "logps/chosen" in entry]
    part = len(logged) // 4
    if not part:
        return ""
    before, after = (sum(side) / part for side in (logged[:part], logged[-part:]))
    if after >= before:
        return ""
    return (
        f"{_BEGIN}. In the training log, the log-probability of their selected tokens fell from {before:.2f} to {after:.2f} nats "
        f"(means of the first and the last quarter of the log). {_END}"
    )
