"""One self-contained page about a run: no network, no library, opens from disk."""

import hashlib
import json
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from tokenward.artifacts import atomic_write
from tokenward.report.channels import Channels, other_runs
from tokenward.report.charts import bar_chart, histogram, line_chart
from tokenward.report.collect import RunFolder, displacement
from tokenward.report.pairs import Drawn, PairReader, ScoredPair, draw
from tokenward.report.payload import LARGEST, payload
from tokenward.report.summary import SIDES, Summary, summarise
from tokenward.report.tables import credit_rows, curves, figure_rows, recipe_of, version_rows

ROWS = 200
REPLIES = 50
SAMPLE = 1000
"""Pairs that distributions and scales are made from, where the run has more."""

SCRIPTS = ("selection.js", "tokens.js", "viewer.js")


@dataclass(frozen=True)
class Report:
    """A run as one HTML page.

    Attributes:
        html: The page, whole.
    """

    html: str

    def _repr_html_(self) -> str:
        """The page inside a notebook's cell, in a frame of its own."""
        return f'<iframe srcdoc="{escape(self.html)}" style="width: 100%; height: 50em; border: 0"></iframe>'

    def save(self, path: str | Path) -> Path:
        """Write the page to a file, whole or not at all; returns the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, self.html)
        return path


def make_report(folder: str | Path, *, rows: int = ROWS, also: Sequence[str | Path] = ()) -> Report:
    """The report of a run from what its stages left; nothing is computed by a model.

    Args:
        folder: The run's folder; stages that have not finished are left out of the page.
        rows: Comparisons on the page at most.
        also: Folders of further runs, whose scores of the same responses can be switched to.

    Raises:
        UserError: the folder holds no finished stage, or a scorer of one's own cannot be found.
    """
    run = RunFolder.read(folder)
    return Report(_page(run, _scores(run, rows, also)))


def write_report(folder: str | Path, *, rows: int = ROWS, also: Sequence[str | Path] = ()) -> Path:
    """Write a run's report to ``report/index.html`` in its folder; returns that path.

    Raises:
        UserError: as :func:`make_report`.
    """
    return make_report(folder, rows=rows, also=also).save(Path(folder) / "report" / "index.html")


@dataclass(frozen=True)
class _Scores:
    """The part of a report that is made from the score store."""

    data: dict[str, Any]
    drawn: Drawn
    summary: Summary
    scorer: str


def _scores(run: RunFolder, rows: int, also: Sequence[str | Path]) -> _Scores | None:
    reader = PairReader.open(run)
    if reader is None:
        return None
    names = run.special_names()
    drawn = draw(reader, rows, sample=SAMPLE)
    sample = [reader.pair(place) for place in drawn.sample]
    channels = Channels(reader, drawn.values, sample, other_runs([Path(folder) for folder in also]))
    pairs: list[ScoredPair] = [reader.pair(place) for place in drawn.places]
    main = channels.channels[0]
    summary = summarise(sample, reader.scorer, limit=main.limit, zero=main.zero, names=names)
    return _Scores(payload(pairs, drawn, channels, names), drawn, summary, reader.scorer_name)


def _page(run: RunFolder, scores: _Scores | None) -> str:
    environment = Environment(
        loader=PackageLoader("tokenward.report", "assets"), autoescape=True, undefined=StrictUndefined
    )
    # As JSON has it: a space, a line break or a mark that turns the text is seen.
    environment.filters["quoted"] = json.dumps
    assets = files("tokenward.report") / "assets"
    style = (assets / "style.css").read_text(encoding="utf-8")
    parts = [(assets / name).read_text(encoding="utf-8") for name in SCRIPTS] if scores else []
    script = "\n".join(parts)
    return environment.get_template("page.html.jinja").render(
        run=run,
        name=run.path.resolve().name,
        displacement=displacement(run),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        scores=scores,
        has_known=scores is not None and any(item["kind"] == "known" for item in scores.data["channels"]),
        size_limit=LARGEST,
        shown_replies=REPLIES,
        charts=_charts(scores) if scores else [],
        curves=[line_chart(title, series, x_label="step") for title, series in curves(run)],
        figures=figure_rows(run.figures()),
        credit=credit_rows(run.figures()),
        replies=run.replies(),
        prompts=run.prompts(),
        recipe=yaml.safe_dump(recipe_of(run), sort_keys=False, allow_unicode=True),
        versions=version_rows(run),
    )


def _charts(scores: _Scores) -> list[Any]:
    summary = scores.summary
    grouped = [("by tenth of the response", summary.positions), ("by kind of token", summary.classes)]
    return [
        histogram(f"{scores.scorer}: share of tokens by score", summary.edges, summary.sides),
        *(
            bar_chart(
                f"{scores.scorer}: mean score {title}",
                [mean.label for mean in means],
                {side: [getattr(mean, side) for mean in means] for side in SIDES},
            )
            for title, means in grouped
        ),
    ]


def _hash(text: str) -> str:
    """What the page's policy allows by name: this text and no other."""
    return f"sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
