"""Figures as rows of a table: all of them, or the few that say what a run did."""

from collections.abc import Mapping
from typing import NamedTuple

from tokenward.display import interval, largest, rounded
from tokenward.evaluation.statistics import Figure

AUROC = "credit/auroc/"


class FigureRow(NamedTuple):
    """A figure for display; before and after are empty unless it is a change."""

    name: str
    before: str
    after: str
    value: str
    interval: str
    n: int


def figure_rows(figures: Mapping[str, Figure]) -> list[FigureRow]:
    """One row per figure; a change is on one row with its values before and after."""
    changed = {name.removesuffix("/change") for name in figures if name.endswith("/change")}
    parts = {f"{name}/{part}" for name in changed for part in ("before", "after")}
    return [_row(name, figures) for name in figures if name not in parts]


def main_rows(figures: Mapping[str, Figure]) -> list[FigureRow]:
    """The figures that say what a run did, as far as they were measured, under names in words.

    The reward of the replies, how many of them end, their length, their distance from the start, the accuracy on eval pairs
    and the AUROC of the token scores. A figure without a change has its value in ``after``.
    """
    reward = reward_name(figures)
    labels = {
        f"{reward}/change": f"reward ({reward})",
        "ended/change": "replies that end",
        "length/change": "reply length, tokens",
        "kl/per_reply": "KL to the start, nats",
        "preference/accuracy": "preference accuracy",
        next((name for name in figures if name.startswith(AUROC)), AUROC): "token AUROC",
    }
    rows = [_row(name, figures)._replace(name=label) for name, label in labels.items() if name in figures]
    return [row if row.before else row._replace(after=row.value, value="") for row in rows]


def main_note(figures: Mapping[str, Figure]) -> str:
    """How to read the main figures."""
    note = "Intervals: 95 %, of the change if there is one. Chance is 0.5 for accuracy and AUROC"
    control = figures.get(f"{AUROC}random")
    return f"{note}." if control is None else f"{note}; random scores have an AUROC of {control.value:.3f}."


def reward_name(figures: Mapping[str, Figure]) -> str | None:
    """The quantity that stands for the quality of replies: the first metric, else the eval reward; None without either."""
    changed = [name.removesuffix("/change") for name in figures if name.endswith("/change")]
    metrics = [name for name in changed if name not in ("length", "ended", "eval_reward") and "/" not in name]
    return next(iter([*metrics, *(name for name in changed if name == "eval_reward")]), None)


def _row(name: str, figures: Mapping[str, Figure]) -> FigureRow:
    figure, (base, _, part) = figures[name], name.rpartition("/")
    sides = ("before", "after") if part == "change" else ()
    whole = [figures[f"{base}/{side}"].value for side in sides]
    scale = largest([*whole, figure.value])
    before, after = [rounded(value, scale) for value in whole] or ["", ""]
    ends = interval(figure.low, figure.high, figure.n, scale)
    return FigureRow(name, before, after, rounded(figure.value, scale), ends, figure.n)
