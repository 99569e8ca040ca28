"""The contents of a run's folder as plain values: manifests, figures, replies, training logs."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tokenward.artifacts import MANIFEST, OBSERVED, Manifest, content_of, read_json, read_jsonl, read_manifest
from tokenward.errors import UserError
from tokenward.evaluation.statistics import Figures, load_figures
from tokenward.report.progress import Progress, read_progress
from tokenward.stages.lists import NAMES
from tokenward.stages.preview import FILE, Preview


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The folder of a run.

    Attributes:
        path: The folder.
        manifests: Manifests of the finished stages by name, in the order in which they started. While the run goes on,
            without those that it will make again.
        begun: Manifests of the stages that have begun but not finished.
        progress: Where the run is, if it has not ended.
    """

    path: Path
    manifests: Mapping[str, Manifest]
    begun: Mapping[str, Manifest] = field(default_factory=dict[str, Manifest])
    progress: Progress | None = None

    @classmethod
    def read(cls, path: str | Path) -> "RunFolder":
        """Read the manifests of a run's stages.

        Raises:
            UserError: the folder does not exist, or holds no finished stage of a run and no run that goes on.
        """
        path = Path(path)
        if not path.is_dir():
            raise UserError(
                f"there is no folder {path}. Name the folder of a run, such as runs/quickstart; `tokenward run RECIPE` makes one.",
                code="not-a-run",
            )
        found = [read_manifest(file.parent) for file in path.glob(f"*/{MANIFEST}")]
        done = sorted((item for item in found if item.complete), key=lambda item: (item.created, item.stage))
        begun = {item.stage: item for item in found if not item.complete}
        progress = read_progress(path)
        if progress is not None:
            done = _valid(done, begun.values())
        elif not done:
            raise UserError(
                f"{path} holds no finished stage of a run. Name the folder of a run, such as runs/quickstart, or run the "
                "recipe first: `tokenward run RECIPE`.",
                code="not-a-run",
            )
        manifests = [*_data_manifests(path, done), *done]
        stages = {manifest.stage: manifest for manifest in manifests}
        return cls(path=path, manifests=stages, begun=begun, progress=progress)

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
            for other, made in manifest.inputs.items()
            if other in self.manifests and not self.manifests[other].is_input(made)
        ]

    def figures(self) -> Figures:
        """The figures of the evaluation; empty without an evaluation."""
        path = self.path / "evaluation" / "metrics.json"
        known = "evaluation" in self.manifests and path.is_file()
        return _content(path, load_figures, {}) if known else {}

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

    def lines(self, stage: str, name: str, *, so_far: bool = False) -> list[dict[str, Any]]:
        """The lines of a stage's JSONL file; empty without that file.

        Args:
            stage: Name of the stage.
            name: Name of the file.
            so_far: Read it also if the stage has begun but not finished.
        """
        path, known = self.path / stage / name, {*self.manifests, *(self.begun if so_far else ())}
        return _content(path, read_jsonl, []) if stage in known and path.is_file() else []

    def replies(self) -> list[dict[str, Any]]:
        """The evaluation's replies before and after training."""
        return self.lines("evaluation", "samples.jsonl")

    def histories(self) -> dict[str, list[dict[str, Any]]]:
        """The log of each training stage, so far, one entry per logged step."""
        names = (*self.manifests, *self.begun)
        found = {name: self.lines(name, "history.jsonl", so_far=True) for name in names}
        return {name: entries for name, entries in found.items() if entries}

    def watched(self) -> dict[str, list[dict[str, Any]]]:
        """The replies to fixed prompts during each training, so far."""
        names = (name for name in (*self.manifests, *self.begun) if name != "evaluation")
        found = {name: self.lines(name, "samples.jsonl", so_far=True) for name in names}
        return {name: lines for name, lines in found.items() if lines}

    def preview(self) -> Preview | None:
        """A few pairs that the oracle scored while it trained; None if there is nothing of the kind."""
        path = self.path / "oracle" / FILE
        known = "oracle" in {*self.manifests, *self.begun} and path.is_file()
        return _content(path, Preview.read, None) if known else None

    def prompts(self) -> dict[str, Any]:
        """The learned prompts of a classification task; empty for other runs."""
        path = self.path / "evaluation" / "prompts.json"
        return _content(path, read_json, {}) if "evaluation" in self.manifests and path.is_file() else {}

    def special_names(self) -> dict[int, str]:
        """Names of special tokens by id, from the tokenizer of the first trained model, or of the policy if it has another."""
        scores = self.manifests.get("scores")
        other = scores is not None and "token_coverage" in scores.facts
        for stage in ("policy",) if other else NAMES:
            path = self.path / stage / "model" / "tokenizer.json"
            if path.is_file():
                added = _content(path, lambda path: read_json(path).get("added_tokens", []), [])
                return {int(token["id"]): str(token["content"]) for token in added}
        return {}


T = TypeVar("T")


def _content(path: Path, read: Callable[[Path], T], nothing: T) -> T:
    """What a file of a run holds; ``nothing`` if it is broken and only for the eye.

    Raises:
        UserError: it is broken.
    """
    try:
        return content_of(path, read)
    except UserError:
        if path.name in OBSERVED:
            return nothing
        raise


def _valid(done: list[Manifest], begun: Iterable[Manifest]) -> list[Manifest]:
    """The finished stages whose inputs are what the folder holds now, or will hold when the run has ended."""
    known: dict[str, Manifest | None] = {item.stage: item for item in (*done, *begun)}
    while True:
        fits = [
            all(name not in known or _fits(known[name], made) for name, made in item.inputs.items())
            for item in done
        ]
        if all(fits):
            return done
        known |= {item.stage: None for item, fit in zip(done, fits, strict=True) if not fit}
        done = [item for item, fit in zip(done, fits, strict=True) if fit]


def _fits(found: Manifest | None, made_from: str) -> bool:
    return found is not None and found.is_input(made_from)


def _data_manifests(path: Path, stages: list[Manifest]) -> list[Manifest]:
    """Manifests of the token ids and the pairs that the scores belong to."""
    made = {found.stage: found.inputs["pairs"] for found in stages if "pairs" in found.inputs}
    pairs = made.get("scores", made.get("reference", ""))
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
            f"{_BEGIN}. At update {noted['warned_at']}, their selected tokens were more than {noted['margin']:g} nats per token "
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
