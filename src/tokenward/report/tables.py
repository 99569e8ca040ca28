"""Tables and curves of a report: figures, training logs, the recipe, versions and fingerprints."""

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

from tokenward.display import interval, largest, rounded
from tokenward.evaluation.statistics import Figure
from tokenward.report.charts import Points
from tokenward.report.collect import RunFolder

SHARE = "share of tokens with weight"
LOGGED = (
    ("loss", ("loss", "eval_loss")),
    ("rewards", ("rewards/chosen", "rewards/rejected")),
    ("log-probability of the selected tokens", ("logps/chosen", "logps/rejected")),
    ("accuracy of the rewards", ("rewards/accuracies", "eval_rewards/accuracies")),
    ("negative log-likelihood", ("nll",)),
    (SHARE, ("kept/chosen", "kept/rejected")),
)
"""What is drawn of a training's log: a title, and the names that share a chart."""


LOOKS = 4
"""Columns of replies while training: more would be too narrow to read."""


class FigureRow(NamedTuple):
    """A figure as it is shown: before and after are empty where it is no change of something."""

    name: str
    before: str
    after: str
    value: str
    interval: str
    n: int


def figure_rows(figures: Mapping[str, Figure]) -> list[FigureRow]:
    """The evaluation's figures, a change together with what it is a change of."""
    changed = {name.removesuffix("/change") for name in figures if name.endswith("/change")}
    rows = []
    for name, figure in figures.items():
        base, _, part = name.rpartition("/")
        if base in changed and part in ("before", "after"):
            continue
        sides = ("before", "after") if part == "change" and base in changed else ()
        whole = [figures[f"{base}/{side}"].value for side in sides]
        scale = largest([*whole, figure.value])
        before, after = [rounded(value, scale) for value in whole] or ["", ""]
        ends = interval(figure.low, figure.high, figure.n, scale)
        rows.append(FigureRow(name, before, after, rounded(figure.value, scale), ends, figure.n))
    return rows


def credit_rows(figures: Mapping[str, Figure]) -> list[FigureRow]:
    """How well each scorer finds the tokens of known value; empty where the data knows none."""
    prefix = "credit/auroc/"
    found = {name.removeprefix(prefix): figure for name, figure in figures.items() if name.startswith(prefix)}
    return figure_rows(found)


def curves(run: RunFolder) -> Iterator[tuple[str, dict[str, Points]]]:
    """Training curves: a title, and points (step, value) by name."""
    for stage, entries in run.histories().items():
        for title, names in LOGGED:
            series = {name: _points(entries, name) for name in names}
            known = {name: points for name, points in series.items() if _says_something(name, points)}
            if known:
                yield f"{stage}: {title}", known
    looks = {
        name: _points(run.events(), key)
        for name, key in (("mean score of fresh samples", "sample_score"), ("reward's loss", "loss"))
    }
    for name, points in looks.items():
        if len(points) > 1:
            yield f"online: {name}, each time the reward is learned", {name: points}


def _says_something(name: str, points: Points) -> bool:
    """Whether a curve is drawn: of one point there is none, and that every token has weight is in the recipe."""
    return len(points) > 1 and not (name.startswith("kept/") and all(value == 1 for _, value in points))


def _points(entries: list[dict[str, Any]], name: str) -> Points:
    return [
        (float(entry["step"]), float(entry[name]))
        for entry in entries
        if isinstance(entry.get(name), int | float) and "step" in entry
    ]


class WatchedReplies(NamedTuple):
    """Replies to the same prompts at several steps of a training."""

    stage: str
    steps: list[int]
    rows: list[tuple[str, list[str]]]


def watched_rows(run: RunFolder) -> list[WatchedReplies]:
    """What each training answered to the fixed prompts: at most :data:`LOOKS` steps, the first and the last among them.

    Left out where the evaluation has the same replies before and after, and there was no look in between.
    """
    evaluated = {(reply.get("before"), reply.get("after")) for reply in run.replies()}
    found = []
    for stage, lines in run.watched().items():
        every = sorted({int(line["step"]) for line in lines})
        last = len(every) - 1
        steps = sorted({every[last * part // (LOOKS - 1)] for part in range(LOOKS)})
        replies = {(line["key"], int(line["step"])): str(line["reply"]) for line in lines}
        prompts = {line["key"]: str(line["prompt"]) for line in lines}
        rows = [(text, [replies.get((key, step), "") for step in steps]) for key, text in prompts.items()]
        if not all(tuple(texts) in evaluated for _, texts in rows):
            found.append(WatchedReplies(stage, steps, rows))
    return found


def recipe_of(run: RunFolder) -> dict[str, Any]:
    """Every setting that the stages' manifests hold, put together as a recipe has them."""
    recipe: dict[str, Any] = {}
    for manifest in run.manifests.values():
        _merge(recipe, manifest.settings)
    return recipe


def _merge(into: dict[str, Any], settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict) and "name" not in value:
            _merge(into[key], value)
        elif isinstance(value, Mapping):
            into[key] = {}
            _merge(into[key], value)
        elif value is not None or key not in into:
            into[key] = value


def provenance(run: RunFolder) -> str:
    """Which models and which template the stored values come from, in one sentence; empty where there are none."""
    if not {"reference", "scores"} <= set(run.manifests):
        return ""
    scores, inputs = run.manifests["scores"], run.manifests["reference"].inputs
    makers = [
        f"{name} ({objective}, {fingerprint})"
        if (objective := _objective(run, name))
        else f"{name} ({fingerprint})"
        for name, fingerprint in scores.inputs.items()
        if name != "reference"
    ]
    # Of a model on disk the folder's name only: what is above it is the reader's business.
    name = str(scores.facts.get("reference", "the start"))
    model = PurePath(name).name if PurePath(name).is_absolute() else name
    reference = f"reference {model} ({inputs.get('model', 'no fingerprint')})"
    template = f"template {run.setting('encoded', 'tokens', 'template')} ({inputs.get('template', 'no fingerprint')})"
    parts = ", ".join([*makers, reference, template])
    return f"Scores are made with {parts}, in {run.setting('scores', 'scores', 'precision')}."


def _objective(run: RunFolder, stage: str) -> str:
    name = run.setting(stage, stage, "objective", "name")
    return f"objective {name}" if name else ""


class VersionRow(NamedTuple):
    """A stage, when it was begun, its fingerprint, what went in, and what it ran with."""

    stage: str
    created: str
    fingerprint: str
    inputs: str
    versions: str


def version_rows(run: RunFolder) -> list[VersionRow]:
    """Where each stage came from."""
    return [
        VersionRow(
            name,
            manifest.created,
            manifest.fingerprint,
            ", ".join(f"{key} {value}" for key, value in manifest.inputs.items()),
            ", ".join(f"{key} {value}" for key, value in manifest.versions.items()),
        )
        for name, manifest in run.manifests.items()
    ]
