"""Tables and figures of a run: scores by side, position and token, and what training changed."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np

from tokenward.evaluation.statistics import Figure
from tokenward.evaluation.tables import AUROC, FigureRow, figure_rows
from tokenward.hidden import hidden
from tokenward.report.charts import Points
from tokenward.report.collect import RunFolder
from tokenward.report.pairs import ScoredPair, scores_of
from tokenward.report.pieces import eos_count, pieces, token_class
from tokenward.scoring.scorers import Scorer

SIDES = ("chosen", "rejected")
POSITIONS = 10
BINS = 41
LISTED = 15
LEAST_SEEN = 5
"""Tokens that occur less often are not listed, because their mean says little."""


class MeanScore(NamedTuple):
    """Mean score of some tokens by side; None if a side has none."""

    label: str
    chosen: float | None
    rejected: float | None
    n: int


class TokenMean(NamedTuple):
    """Mean score of a token over its occurrences."""

    text: str
    mean: float
    n: int


class Summary(NamedTuple):
    """Distributions of a run's scores over some pairs.

    A histogram per side (values outside count in the first or last bin), mean scores by tenth of the response and by class
    of token, and the tokens with the highest and the lowest mean.
    """

    pairs: int
    edges: list[float]
    sides: dict[str, list[float]]
    positions: list[MeanScore]
    classes: list[MeanScore]
    raised: list[TokenMean]
    lowered: list[TokenMean]


Groups = dict[tuple[str, str], list[float]]
"""Scores by label and side."""


def summarise(
    sample: Sequence[ScoredPair], scorer: Scorer, *, limit: float, zero: float, names: dict[int, str]
) -> Summary:
    """Distributions of the scores of some pairs; the histogram reaches ``limit`` to both sides of ``zero``."""
    by_side: dict[str, list[np.ndarray]] = {side: [] for side in SIDES}
    positions: Groups = defaultdict(list)
    classes: Groups = defaultdict(list)
    tokens: dict[str, list[float]] = defaultdict(list)
    for pair in sample:
        for side, text, record in zip(SIDES, pair.comparison.responses, pair.records, strict=True):
            scores = scores_of(scorer, record)
            by_side[side].append(scores)
            shown, size = pieces(text, record, names), len(record.ids)
            first_eos = size - eos_count(text, record)
            for place, (piece, score) in enumerate(zip(shown, scores.tolist(), strict=True)):
                if score == score:  # tokens without a score have no part in a mean
                    positions[f"{place * POSITIONS // size * 100 // POSITIONS} %", side].append(score)
                    classes[token_class(piece, eos=place >= first_eos), side].append(score)
                    tokens[piece].append(score)
    edges = np.linspace(zero - limit, zero + limit, BINS + 1)
    raised, lowered = extreme_tokens(tokens)
    return Summary(
        pairs=len(sample),
        edges=edges.tolist(),
        sides={side: _shares(parts, edges) for side, parts in by_side.items()},
        positions=_means(positions, [f"{tenth * 100 // POSITIONS} %" for tenth in range(POSITIONS)]),
        classes=_means(classes, sorted({label for label, _ in classes})),
        raised=raised,
        lowered=lowered,
    )


def _means(groups: Groups, labels: Sequence[str]) -> list[MeanScore]:
    found = []
    for label in labels:
        sides = [groups.get((label, side), []) for side in SIDES]
        means = (sum(scores) / len(scores) if scores else None for scores in sides)
        found.append(MeanScore(label, *means, n=sum(map(len, sides))))
    return found


def _shares(parts: Sequence[np.ndarray], edges: np.ndarray) -> list[float]:
    values = np.concatenate(parts)
    values = values[~np.isnan(values)].clip(edges[0], edges[-1])
    return (np.histogram(values, edges)[0] / max(len(values), 1)).tolist()


def extreme_tokens(tokens: Mapping[str, Sequence[float]]) -> tuple[list[TokenMean], list[TokenMean]]:
    """The tokens with the highest and with the lowest mean score; no token is in both lists."""
    found = [
        TokenMean(text, sum(scores) / len(scores), len(scores))
        for text, scores in tokens.items()
        if len(scores) >= LEAST_SEEN and text
    ]
    found.sort(key=lambda item: (item.mean, item.text))
    middle = len(found) // 2
    return found[middle:][::-1][:LISTED], found[:middle][:LISTED]


SHARE = "share of selected tokens"
LOGGED = (
    ("loss", ("loss", "eval_loss")),
    ("rewards", ("rewards/chosen", "rewards/rejected")),
    ("log-probability of the tokens that train", ("logps/chosen", "logps/rejected")),
    ("reward accuracy", ("rewards/accuracies", "eval_rewards/accuracies")),
    ("negative log-likelihood", ("nll",)),
    (SHARE, ("kept/chosen", "kept/rejected")),
)
"""The charts of a training log: a title, and the logged names that share a chart.

Eval rows count all their tokens. If training counts selected ones, both are different quantities and have a chart each.
"""

EVENTS = (("mean score of new samples", "sample_score"), ("loss of the reward", "loss"))
"""The charts of an online run's events: a title and a name."""

LOOKS = 4
"""Columns of replies during training; more would be too narrow to read."""


def credit_rows(figures: Mapping[str, Figure]) -> list[FigureRow]:
    """How well each scorer finds the tokens of known value; empty if the data has no spans."""
    found = {name.removeprefix(AUROC): figure for name, figure in figures.items() if name.startswith(AUROC)}
    return figure_rows(found)


def curves(run: RunFolder) -> Iterator[tuple[str, dict[str, Points]]]:
    """Training curves: a title, and points (step, value) by name. A name says how many of its values cannot be drawn."""
    for stage, entries in run.histories().items():
        for title, names in LOGGED if _trains_on_all(run, stage) else _apart(LOGGED):
            series = {name: _points(entries, name) for name in names}
            known = dict(_finite(name, points) for name, points in series.items() if _is_curve(name, points))
            if any(known.values()):
                yield f"{stage}: {title}", known
    for title, name in EVENTS:
        points = _points(run.lines("online", "events.jsonl"), name)
        if len(points) > 1:
            label, drawn = _finite(title, points)
            yield f"online: {title}, each time the reward is learned", {label: drawn}


def reach(title: str, series: Mapping[str, Points]) -> tuple[float, float]:
    """Values that the y axis of a training curve has to reach, so that it shows changes as large as they are.

    Shares and accuracies have their whole range, most others 0. A log-probability is far from 0: its axis spans at least a
    tenth of its size.
    """
    if "accuracy" in title or "share" in title:
        return 0.0, 1.0
    if "log-probability" not in title:
        return 0.0, 0.0
    values = [value for points in series.values() for _, value in points]
    low, high = min(values, default=0.0), max(values, default=0.0)
    room = max(0.0, 0.1 * max(abs(low), abs(high)) - (high - low)) / 2
    return low - room, high + room


def _trains_on_all(run: RunFolder, stage: str) -> bool:
    """Whether a stage trains on all tokens with one weight, as eval rows are measured."""
    terms = run.setting(stage, stage, "objective", "terms") or ()
    selected = any(isinstance(term, Mapping) and "selection" in term for term in terms)
    return run.setting(stage, stage, "selection", "name") in (None, "all") and not selected


def _apart(charts: Iterable[tuple[str, tuple[str, ...]]]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The charts with the names of eval rows in charts of their own."""
    for title, names in charts:
        evaluated = tuple(name for name in names if name.startswith("eval_"))
        if not evaluated:
            yield title, names
            continue
        yield f"{title}, over the tokens that train", tuple(name for name in names if name not in evaluated)
        yield f"{title} of the eval rows, over all tokens", evaluated


def _is_curve(name: str, points: Points) -> bool:
    """One point makes no curve, and a constant share of 1 says only what the recipe says."""
    return len(points) > 1 and not (name.startswith("kept/") and all(value == 1 for _, value in points))


def _finite(name: str, points: Points) -> tuple[str, Points]:
    """The points that can be drawn; training that diverges logs NaN or infinity."""
    found = [point for point in points if math.isfinite(point[1])]
    left_out = len(points) - len(found)
    return f"{name} ({left_out} values are not finite)" if left_out else name, found


def _points(entries: list[dict[str, Any]], name: str) -> Points:
    return [
        (float(entry["step"]), float(entry[name]))
        for entry in entries
        if isinstance(entry.get(name), int | float) and "step" in entry
    ]


class WatchedReplies(NamedTuple):
    """Replies to the fixed prompts at several steps of a training."""

    stage: str
    steps: list[int]
    rows: list[tuple[str, list[str]]]


def watched_rows(run: RunFolder) -> list[WatchedReplies]:
    """Replies to the fixed prompts during each training, at up to :data:`LOOKS` steps including the first and the last.

    A training is left out if it shows only what the evaluation shows too: the same replies before and after.
    """
    evaluated = {(reply.get("before"), reply.get("after")) for reply in run.replies()}
    found = []
    for stage, lines in run.watched().items():
        every = sorted({int(line["step"]) for line in lines})
        steps = sorted({every[(len(every) - 1) * part // (LOOKS - 1)] for part in range(LOOKS)})
        replies = {(line["key"], int(line["step"])): str(line["reply"]) for line in lines}
        prompts = {line["key"]: str(line["prompt"]) for line in lines}
        rows = [(text, [replies.get((key, step), "") for step in steps]) for key, text in prompts.items()]
        if not all(tuple(texts) in evaluated for _, texts in rows):
            found.append(WatchedReplies(stage, steps, rows))
    return found


def recipe_of(run: RunFolder) -> dict[str, Any]:
    """The settings in the manifests of all stages, joined into one recipe."""
    recipe: dict[str, Any] = {}
    for manifest in run.manifests.values():
        _merge(recipe, manifest.settings)
    return hidden(recipe)  # an earlier version masked no secrets


def _merge(into: dict[str, Any], settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            # A named object is replaced as a whole: arguments of another object do not belong to it.
            if not isinstance(into.get(key), dict) or "name" in value:
                into[key] = {}
            _merge(into[key], value)
        elif value is not None or key not in into:
            into[key] = value


def provenance(run: RunFolder) -> str:
    """One sentence on the models and the template behind the stored values; empty without scores."""
    if not {"reference", "scores"} <= set(run.manifests):
        return ""
    scores, inputs = run.manifests["scores"], run.manifests["reference"].inputs
    makers = []
    for name, fingerprint in scores.inputs.items():
        objective = run.setting(name, name, "objective", "name")
        if name != "reference":
            makers.append(f"{name} ({f'objective {objective}, ' if objective else ''}{fingerprint})")
    # For a local model only the folder's name: the path above it is private.
    name = str(scores.facts.get("reference", "the start"))
    model = PurePath(name).name if PurePath(name).is_absolute() else name
    reference = f"reference {model} ({inputs.get('model', 'no fingerprint')})"
    template = f"template {run.setting('encoded', 'tokens', 'template')} ({inputs.get('template', 'no fingerprint')})"
    precision = run.setting("scores", "scores", "precision")
    sentence = f"The scores come from {', '.join([*makers, reference, template])}, in {precision}."
    return " ".join([sentence, *_divided(scores.facts.get("token_coverage"))])


def _divided(coverage: dict[str, Any] | None) -> list[str]:
    """A sentence on scores that were divided among other tokens than those that they were computed for."""
    if coverage is None:
        return []
    placed = min(coverage["placed"].values(), default=1.0)
    return [
        f"The policy has another tokenizer, so they were divided among its tokens, which are shown: {coverage['text']:.1%} of the text has a "
        f"score, and {placed:.1%} of the values were placed. {coverage['alone']:.1%} of the tokens have a score of their own; the others "
        f"share one in {coverage['segments']} segments, each selected as a whole."
    ]


def version_rows(run: RunFolder) -> list[dict[str, str]]:
    """The origin of each stage: when it started, its fingerprint, its inputs and the versions of the packages."""
    return [
        {
            "stage": name,
            "created": manifest.created,
            "fingerprint": manifest.fingerprint,
            "inputs": ", ".join(f"{key} {value}" for key, value in manifest.inputs.items()),
            "versions": ", ".join(f"{key} {value}" for key, value in manifest.versions.items()),
        }
        for name, manifest in run.manifests.items()
    ]
