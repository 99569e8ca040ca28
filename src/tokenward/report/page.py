"""A run as one self-contained HTML page, which opens from disk and needs no network."""

import hashlib
import json
import re
from base64 import b64encode
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from tokenward.artifacts import atomic_write
from tokenward.errors import UserError
from tokenward.evaluation.statistics import Figure
from tokenward.evaluation.tables import figure_rows, main_note, main_rows, reward_name
from tokenward.ops.selection import MAX_DENOMINATOR
from tokenward.plugins import without_plugins
from tokenward.report import summary as of_run
from tokenward.report.channels import SCHEMA, Channels, other_runs
from tokenward.report.charts import bar_chart, histogram, line_chart
from tokenward.report.collect import RunFolder, displacement
from tokenward.report.given import GivenSpans, given_credit, read_spans
from tokenward.report.outcome import metric_name, outcome, reply_rows
from tokenward.report.pairs import Drawn, PairReader, ScoredPair, draw
from tokenward.report.pieces import breaks, eos_count, piece_ends, pieces, shared_words, words
from tokenward.report.selections import RunSelection, scorer_note
from tokenward.stages.preview import Preview

LARGEST = 4_400_000
"""Most characters of packed numbers and texts on a page; further pairs are left out, and the page says so."""

ROWS = 200
REPLIES = 50
SAMPLE = 1000
"""Most pairs for distributions and scales."""

SCRIPTS = "selection statistics tokens units state list curve pair card copies viewer"
"""The scripts share one scope, in this order; the last one starts the page."""


@dataclass(frozen=True)
class Report:
    """A run as one HTML page, ``html``, and the run's ``folder``."""

    html: str
    folder: Path

    def _repr_html_(self) -> str:
        """The page in a notebook cell, in its own frame."""
        return f'<iframe srcdoc="{escape(self.html)}" style="width: 100%; height: 50em; border: 0"></iframe>'

    def save(self, path: str | Path | None = None) -> Path:
        """Write the page atomically to a file, by default ``report/index.html`` in the run's folder; returns its path."""
        path = Path(path or self.folder / "report" / "index.html")
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, self.html)
        return path


def make_report(
    folder: str | Path,
    *,
    rows: int = ROWS,
    also: Sequence[str | Path] = (),
    spans: str | Path | None = None,
    plugins: bool = False,
) -> Report:
    """The report of a run, from the files of its stages. No model is loaded.

    The page of a run that has not ended says so, and shows what there is so far.

    Args:
        folder: The run's folder.
        rows: Most comparisons on the page.
        also: Folders of other runs whose scores of the same responses can be shown.
        spans: File of spans that replace the data's own; ``docs/report.md`` describes it.
        plugins: Whether to import the code that the run's recipe names. It can do whatever you can: leave it out for the run
            of a stranger.

    Raises:
        UserError: the folder holds no finished stage and no run that goes on, a custom scorer cannot be found, or the file of
            spans is wrong.
    """
    return Reports(folder, rows=rows, also=also, spans=spans, plugins=plugins).make()


class Reports:
    """Makes the report of a run again and again. Scores are read again only if a stage has changed.

    The arguments are those of :func:`make_report`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        rows: int = ROWS,
        also: Sequence[str | Path] = (),
        spans: str | Path | None = None,
        plugins: bool = False,
    ) -> None:
        self.folder, self._given, self._plugins = Path(folder), (rows, also, spans), plugins
        self._made: tuple[object, _Scores | None] | None = None

    def make(self, served: str = "") -> Report:
        """The report now.

        Args:
            served: Version of a page that is served and asks the server for news; empty for a file, which asks nothing.
        """
        with nullcontext() if self._plugins else without_plugins("a report only reads"):
            return self._make(served)

    def _make(self, served: str) -> Report:
        run = RunFolder.read(self.folder)
        preview = run.preview()
        state = [manifest.fingerprint for manifest in run.manifests.values()], preview and preview.updates
        if self._made is None or self._made[0] != state:
            self._made = state, _scores(run, *self._given)
        return Report(_page(run, self._made[1], served), run.path)


@dataclass(frozen=True)
class _Scores:
    """The part of a report that comes from the score store."""

    data: dict[str, Any]
    drawn: Drawn
    summary: of_run.Summary
    scorer: str
    given: GivenSpans | None
    credit: dict[str, Figure]
    selections: Sequence[RunSelection]
    preview: Preview | None


def _scores(
    run: RunFolder, rows: int, also: Sequence[str | Path], spans: str | Path | None
) -> _Scores | None:
    reader = PairReader.open(run)
    if reader is None and spans is None:
        reader = PairReader.of_preview(run)
        if reader is None:
            return None
    if reader is None:
        raise UserError(
            f"{run.path} has no pairs with scores, so the spans of {spans} have nothing to be compared with. Leave --spans out.",
            code="no-pairs",
        )
    names = run.special_names() if reader.preview is None else reader.preview.names
    given = read_spans(spans, reader) if spans is not None else None
    marked = given.spans if given is not None else None
    drawn = draw(reader, rows, sample=SAMPLE, wanted=frozenset(marked or ()))
    sample = [reader.pair(place) for place in drawn.sample]
    channels = Channels(reader, drawn.values, sample, other_runs([Path(folder) for folder in also]), marked)
    main = channels.channels[0]
    return _Scores(
        payload([reader.pair(place) for place in drawn.places], drawn, channels, names),
        drawn,
        of_run.summarise(sample, reader.scorer, limit=main.limit, zero=main.zero, names=names),
        reader.scorer_name,
        given,
        given_credit(given, reader, channels) if given is not None else run.figures(),
        channels.selections,
        reader.preview,
    )


def payload(
    pairs: Sequence[ScoredPair], drawn: Drawn, channels: Channels, names: dict[int, str]
) -> dict[str, Any]:
    """The data of the page's scripts, for the pairs of ``drawn.places`` and the names of special tokens by id."""
    rows: list[dict[str, Any]] = []
    size = 0
    for number in _alternating(drawn.reasons):
        row = _row(pairs[number], drawn.reasons[number], channels)
        size += _size(row)
        if rows and size > LARGEST:
            break
        rows.append(row)
    return {
        "schema": SCHEMA,
        "channels": [channel._asdict() for channel in channels.channels],
        "selection": channels.selection(),
        "denominator": MAX_DENOMINATOR,
        "names": {str(token): name for token, name in names.items()},
        "total": drawn.total,
        "comparisons": rows,
    }


def _alternating(reasons: Sequence[tuple[str, ...]]) -> list[int]:
    """Pairs of every reason in turn, so that a page that is too large still has some of each."""
    turn: dict[str, int] = {}
    order = []
    for number, (first, *_) in enumerate(reasons):
        turn[first] = turn.get(first, 0) + 1
        order.append((turn[first], number))
    return [number for _, number in sorted(order)]


def _row(pair: ScoredPair, reasons: Sequence[str], channels: Channels) -> dict[str, Any]:
    texts: list[list[str]] = []
    responses: list[dict[str, Any]] = []
    values = channels.of(pair)
    for text, record, found in zip(pair.comparison.responses, pair.records, values, strict=True):
        begins, eos = breaks(text, record), eos_count(text, record)
        size = len(begins) - eos
        texts.append(words(pieces(text, record, {})[:size], begins[:size]))
        response = {
            "text": text,
            "eos": eos,
            "ids": _packed(record.ids, "<i4"),
            "ends": _packed(piece_ends(text, record.end), "<i4"),
            "breaks": _packed(begins, "<u1"),
            "values": {name: _packed(value, "<f4") for name, value in found.items()},
        }
        if record.text is not None:
            response["starts"] = _packed(piece_ends(text, record.start), "<i4")
        if record.segment is not None:
            response["joint"] = _packed(record.segment, "<i4")
        responses.append(response)
    return {
        "key": pair.comparison.key,
        # The file's name and line only: the folders above it are private.
        "source": PurePath(pair.comparison.source).name,
        "part": pair.part,
        "number": pair.number,
        "reasons": list(reasons),
        "prompt": [dict(message) for message in pair.comparison.prompt],
        "given": pair.comparison.scores,
        "shared": shared_words(*texts),
        "responses": responses,
    }


def _packed(values: Any, dtype: str) -> str:
    return b64encode(np.asarray(values).astype(dtype).tobytes()).decode()


def _size(row: dict[str, Any]) -> int:
    packed = sum(
        len(text)
        for response in row["responses"]
        for text in (
            *(response[name] for name in ("text", "ids", "ends", "breaks")),
            *response["values"].values(),
        )
    )
    packed += len(json.dumps(row["shared"]))
    return packed + sum(len(message["content"]) for message in row["prompt"])


def waiting_page(folder: Path, reason: str, served: str) -> str:
    """A served page of a run that has nothing to show yet."""
    assets = files("tokenward.report") / "assets"
    style, live = ((assets / name).read_text(encoding="utf-8") for name in ("style.css", "live.js"))
    return _environment().get_template("waiting.html.jinja").render(
        name=folder.resolve().name, reason=reason, served=served,
        style=style, live=live, style_hash=_hash(style), live_hash=_hash(live),
    )  # fmt: skip


def _page(run: RunFolder, scores: _Scores | None, served: str = "") -> str:
    environment = _environment()
    assets = files("tokenward.report") / "assets"
    style = (assets / "style.css").read_text(encoding="utf-8")
    parts = [
        _without_comments((assets / f"{name}.js").read_text(encoding="utf-8"))
        for name in SCRIPTS.split()
        if scores
    ]
    script = "\n".join(parts)
    live = (assets / "live.js").read_text(encoding="utf-8") if served else ""
    drawn = list(of_run.curves(run))
    replies = reply_rows(run)
    return environment.get_template("page.html.jinja").render(
        run=run,
        name=run.path.resolve().name,
        outcome=outcome(run, scores.drawn.agreement if scores and not scores.preview else None),
        displacement=displacement(run),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hashes=" ".join(f"'{_hash(text)}'" for text in (script, live) if text) or "'none'",
        served=served,
        live=live,
        scores=scores,
        scorer_note=scorer_note(run, scores.scorer) if scores else "",
        has_known=scores is not None and any(item["kind"] == "known" for item in scores.data["channels"]),
        size_limit=LARGEST,
        shown_replies=REPLIES,
        charts=_charts(scores) if scores else [],
        curves=[
            line_chart(title, series, x_label="update", y=of_run.reach(title, series))
            for title, series in drawn
        ],
        share_drawn=f"policy: {of_run.SHARE}" in dict(drawn),
        figures=figure_rows(run.figures()),
        main_figures=main_rows(run.figures()),
        main_note=main_note(run.figures()),
        given=scores.given if scores else None,
        made=of_run.provenance(run),
        credit=of_run.credit_rows(scores.credit) if scores else [],
        replies=replies,
        has_references=any(reply.references for reply in replies),
        reward=metric_name(reward_name(run.figures())),
        watched=of_run.watched_rows(run),
        prompts=run.prompts(),
        recipe=yaml.safe_dump(of_run.recipe_of(run), sort_keys=False, allow_unicode=True),
        versions=of_run.version_rows(run),
    )


@cache  # the templates are compiled once
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("tokenward.report", "assets"), autoescape=True, undefined=StrictUndefined
    )
    # As a JSON string, spaces, line breaks and marks that change the direction of text are visible.
    environment.filters["quoted"] = json.dumps
    return environment


def _charts(scores: _Scores) -> list[Any]:
    summary = scores.summary
    grouped = [("by tenth of the response", summary.positions), ("by class of token", summary.classes)]
    return [
        histogram(f"{scores.scorer}: share of tokens by score", summary.edges, summary.sides),
        *(
            bar_chart(
                f"{scores.scorer}: mean score {title}",
                [mean.label for mean in means],
                {side: [getattr(mean, side) for mean in means] for side in of_run.SIDES},
            )
            for title, means in grouped
        ),
    ]


def _hash(text: str) -> str:
    """The hash of an inline script or style, by which the page's content security policy allows it."""
    return f"sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _without_comments(script: str) -> str:
    return re.sub(r"^[ ]*(?://.*|/\*\*[^*]*(?:\*(?!/)[^*]*)*\*/)\n", "", script, flags=re.MULTILINE)
