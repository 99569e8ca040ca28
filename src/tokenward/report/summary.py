"""Tables and figures of a run: scores by side, position and token, and what training changed."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tokenward.display import interval, largest, rounded
from tokenward.errors import UserError
from tokenward.evaluation.statistics import Figure
from tokenward.report.charts import Points
from tokenward.report.collect import RunFolder
from tokenward.report.drawing import figure_class, written
from tokenward.report.pairs import ScoredPair, scores_of
from tokenward.report.pieces import eos_count, pieces, token_class
from tokenward.report.single import DOWN, UP
from tokenward.scoring.scorers import Scorer

if TYPE_CHECKING:
    from matplotlib.axes import Axes


COLUMNS = 3
PANEL_INCHES = (4.2, 2.9)
COLOURS = [tuple(part / 255 for part in colour) for colour in (UP, DOWN)]
"""As on the page."""


def save_curves(folder: str | Path, path: Path) -> int:
    """Draw what the report draws under Training into a file; its ending says the kind (.png, .svg, .pdf).

    Args:
        folder: The run's folder.
        path: The picture.

    Returns:
        How many charts are in it.

    Raises:
        UserError: no stage logged two steps, matplotlib is not installed, or it cannot write such a file.
    """
    run = RunFolder.read(folder)
    drawn = list(curves(run))
    if not drawn:
        raise UserError(
            f"no stage of {run.path} has a history of two logged steps or more, so there is no curve. It holds "
            f"{', '.join(run.manifests)}. Train longer, or log more often: --set policy.training.logging_steps=1."
        )
    rows = -(-len(drawn) // COLUMNS)
    size = (PANEL_INCHES[0] * min(len(drawn), COLUMNS), PANEL_INCHES[1] * rows + 0.4)
    figure = figure_class()(figsize=size, layout="constrained")
    figure.suptitle(run.path.resolve().name, parse_math=False)
    for number, (title, series) in enumerate(drawn, start=1):
        _panel(figure.add_subplot(rows, min(len(drawn), COLUMNS), number), title, series)
    written(figure, path)
    return len(drawn)


def _panel(axes: "Axes", title: str, series: dict[str, Points]) -> None:
    for number, (name, points) in enumerate(series.items()):
        steps, values = zip(*points, strict=True)
        axes.plot(
            steps,
            values,
            color=COLOURS[number % len(COLOURS)],
            linestyle="-" if number == 0 else "--",  # told apart without colour too
            marker="." if len(points) < 30 else "",
            label=name,
        )
    axes.set_title(title, fontsize=9, parse_math=False)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend(fontsize=8, frameon=False)


SIDES = ("chosen", "rejected")
BOTH = "both"
POSITIONS = 10
BINS = 41
LISTED = 15
LEAST_SEEN = 5
"""A token is listed when it was seen so often: a mean over fewer says little."""


class MeanScore(NamedTuple):
    """Mean score of some tokens, by side; None where a side has none."""

    label: str
    chosen: float | None
    rejected: float | None
    n: int


class TokenMean(NamedTuple):
    """Mean score of a token over all its occurrences on both sides."""

    text: str
    mean: float
    n: int


@dataclass(frozen=True)
class Summary:
    """Distributions of a run's scores over some of its pairs.

    Attributes:
        pairs: How many pairs.
        edges: ``[bins + 1]``, of the histogram; what lies outside counts in the first or last bin.
        sides: Share of each side's tokens per bin.
        positions: Mean score by tenth of the response.
        classes: Mean score by kind of token.
        raised: Tokens with the highest mean.
        lowered: Tokens with the lowest mean.
    """

    pairs: int
    edges: list[float]
    sides: dict[str, list[float]]
    positions: list[MeanScore]
    classes: list[MeanScore]
    raised: list[TokenMean]
    lowered: list[TokenMean]


@dataclass
class _Sums:
    """Sums of scores by side and group."""

    total: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    count: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))

    def add(self, label: str, side: str, score: float) -> None:
        self.total[label, side] += score
        self.count[label, side] += 1

    def means(self, labels: Sequence[str]) -> list[MeanScore]:
        return [
            MeanScore(
                label,
                *(self._mean(label, side) for side in SIDES),
                n=sum(self.count[label, side] for side in SIDES),
            )
            for label in labels
        ]

    def _mean(self, label: str, side: str) -> float | None:
        count = self.count[label, side]
        return self.total[label, side] / count if count else None


def summarise(
    sample: Sequence[ScoredPair], scorer: Scorer, *, limit: float, zero: float, names: dict[int, str]
) -> Summary:
    """Distributions of the scores of some pairs.

    Args:
        sample: The pairs.
        scorer: The run's scorer.
        limit: Half the width of the histogram.
        zero: Its middle.
        names: Of tokens that are no text, by id.
    """
    by_side: dict[str, list[np.ndarray]] = {side: [] for side in SIDES}
    position, kind, token = _Sums(), _Sums(), _Sums()
    for pair in sample:
        for side, text, record in zip(SIDES, pair.comparison.responses, pair.records, strict=True):
            scores = scores_of(scorer, record)
            by_side[side].append(scores)
            shown, size = pieces(text, record, names), len(record.ids)
            first_eos = size - eos_count(text, record)
            for place, (piece, score) in enumerate(zip(shown, scores.tolist(), strict=True)):
                if score == score:  # one without a score has no part in a mean
                    position.add(str(place * POSITIONS // size), side, score)
                    kind.add(token_class(piece, eos=place >= first_eos), side, score)
                    token.add(piece, BOTH, score)
    edges = np.linspace(zero - limit, zero + limit, BINS + 1)
    raised, lowered = _halves(token)
    return Summary(
        pairs=len(sample),
        edges=edges.tolist(),
        sides={side: _shares(parts, edges) for side, parts in by_side.items()},
        positions=[
            mean._replace(label=f"{int(mean.label) * 100 // POSITIONS} %")
            for mean in position.means([str(tenth) for tenth in range(POSITIONS)])
        ],
        classes=kind.means(sorted({label for label, _ in kind.count})),
        raised=raised,
        lowered=lowered,
    )


def _shares(parts: Sequence[np.ndarray], edges: np.ndarray) -> list[float]:
    values = np.concatenate(parts)
    values = values[~np.isnan(values)].clip(edges[0], edges[-1])
    return (np.histogram(values, edges)[0] / max(len(values), 1)).tolist()


def _halves(token: _Sums) -> tuple[list[TokenMean], list[TokenMean]]:
    """The tokens with the highest means and those with the lowest; of few tokens half each, so that none is in both."""
    listed = _listed(token)
    middle = len(listed) // 2
    return listed[middle:][::-1][:LISTED], listed[:middle][:LISTED]


def _listed(token: _Sums) -> list[TokenMean]:
    """Tokens that were seen often enough, the lowest mean first."""
    found = [
        TokenMean(text, token.total[text, BOTH] / n, n)
        for (text, _), n in token.count.items()
        if n >= LEAST_SEEN and text
    ]
    return sorted(found, key=lambda item: (item.mean, item.text))


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
