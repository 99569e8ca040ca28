"""A run as one self-contained HTML page that opens from disk without a network."""

import hashlib
import json
import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
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
from tokenward.ops.selection import MAX_DENOMINATOR
from tokenward.report.channels import SCHEMA, Channels, other_runs
from tokenward.report.charts import bar_chart, histogram, line_chart
from tokenward.report.collect import RunFolder, displacement
from tokenward.report.given import GivenSpans, given_credit, read_spans
from tokenward.report.pairs import Drawn, PairReader, ScoredPair, draw
from tokenward.report.pieces import breaks, eos_count, piece_ends, pieces, shared_words, words
from tokenward.report.selections import RunSelection, scorer_note
from tokenward.report.summary import (
    SHARE,
    SIDES,
    Summary,
    credit_rows,
    curves,
    figure_rows,
    provenance,
    recipe_of,
    summarise,
    version_rows,
    watched_rows,
)
from tokenward.scoring.store import TokenRecord

LARGEST = 4_400_000
"""Characters of packed numbers and texts on a page; further pairs are left out, and the page says so."""


def payload(
    pairs: Sequence[ScoredPair], drawn: Drawn, channels: Channels, names: dict[int, str]
) -> dict[str, Any]:
    """What the page's scripts read.

    Args:
        pairs: Those of ``drawn.places``, in their order.
        drawn: How they were chosen.
        channels: What is known of each token.
        names: Of tokens that are no text, by id.
    """
    rows: list[dict[str, Any]] = []
    size = 0
    for number in _mixed(drawn.reasons):
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


def _mixed(reasons: Sequence[tuple[str, ...]]) -> list[int]:
    """Pairs of every kind in turn, so that a page that must end early has some of each."""
    turn: dict[str, int] = {}
    order = []
    for number, (first, *_) in enumerate(reasons):
        turn[first] = turn.get(first, 0) + 1
        order.append((turn[first], number))
    return [number for _, number in sorted(order)]


def _row(pair: ScoredPair, reasons: Sequence[str], channels: Channels) -> dict[str, Any]:
    values = channels.of(pair)
    sides = list(zip(pair.comparison.responses, pair.records, strict=True))
    begins = [breaks(text, record) for text, record in sides]
    first, second = (_words(*side, bits) for side, bits in zip(sides, begins, strict=True))
    return {
        "key": pair.comparison.key,
        # The file's name and line: the folders above it are the reader's business only.
        "source": PurePath(pair.comparison.source).name,
        "part": pair.part,
        "number": pair.number,
        "reasons": list(reasons),
        "prompt": [dict(message) for message in pair.comparison.prompt],
        "given": pair.comparison.scores,
        "shared": shared_words(first, second),
        "responses": [
            {
                "text": text,
                "eos": eos_count(text, record),
                "ids": _packed(record.ids, "<i4"),
                "ends": _packed(piece_ends(text, record.end), "<i4"),
                **({} if record.text is None else {"starts": _packed(piece_ends(text, record.start), "<i4")}),
                "breaks": _packed(bits, "<u1"),
                "values": {name: _packed(value, "<f4") for name, value in found.items()},
            }
            for (text, record), bits, found in zip(sides, begins, values, strict=True)
        ],
    }


def _words(text: str, record: TokenRecord, begins: np.ndarray) -> list[str]:
    size = len(begins) - eos_count(text, record)
    return words(pieces(text, record, {})[:size], begins[:size])


def _packed(values: Any, dtype: str) -> str:
    return b64encode(np.asarray(values).astype(dtype).tobytes()).decode()


def _size(row: dict[str, Any]) -> int:
    packed = sum(
        len(text)
        for response in row["responses"]
        for text in (
            response["text"],
            response["ids"],
            response["ends"],
            response["breaks"],
            *response["values"].values(),
        )
    )
    packed += len(json.dumps(row["shared"]))
    return packed + sum(len(message["content"]) for message in row["prompt"])


ROWS = 200
REPLIES = 50
SAMPLE = 1000
"""Pairs that distributions and scales are made from, where the run has more."""

SCRIPTS = (
    "selection.js",
    "statistics.js",
    "tokens.js",
    "units.js",
    "state.js",
    "list.js",
    "curve.js",
    "pair.js",
    "card.js",
    "copies.js",
    "viewer.js",
)
"""In one scope and in this order; the last one starts the page."""


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


def make_report(
    folder: str | Path,
    *,
    rows: int = ROWS,
    also: Sequence[str | Path] = (),
    spans: str | Path | None = None,
) -> Report:
    """The report of a run from what its stages left; nothing is computed by a model.

    Args:
        folder: The run's folder; stages that have not finished are left out of the page.
        rows: Comparisons on the page at most.
        also: Folders of further runs, whose scores of the same responses can be switched to.
        spans: File of spans of known value, outlined in place of the data's own; ``docs/report.md`` says what is in it.

    Raises:
        UserError: the folder holds no finished stage, a scorer of one's own cannot be found, or the file of spans is not
            as it must be.
    """
    run = RunFolder.read(folder)
    return Report(_page(run, _scores(run, rows, also, spans)))


def write_report(
    folder: str | Path,
    *,
    rows: int = ROWS,
    also: Sequence[str | Path] = (),
    spans: str | Path | None = None,
) -> Path:
    """Write a run's report to ``report/index.html`` in its folder; returns that path.

    Raises:
        UserError: as :func:`make_report`.
    """
    report = make_report(folder, rows=rows, also=also, spans=spans)
    return report.save(Path(folder) / "report" / "index.html")


@dataclass(frozen=True)
class _Scores:
    """The part of a report that is made from the score store."""

    data: dict[str, Any]
    drawn: Drawn
    summary: Summary
    scorer: str
    given: GivenSpans | None
    credit: dict[str, Figure]
    selections: Sequence[RunSelection]


def _scores(
    run: RunFolder, rows: int, also: Sequence[str | Path], spans: str | Path | None
) -> _Scores | None:
    reader = PairReader.open(run)
    if reader is None:
        if spans is not None:
            raise UserError(
                f"{run.path} has no pairs with scores to compare the spans of {spans} with. Leave --spans out."
            )
        return None
    names = run.special_names()
    given = read_spans(spans, reader) if spans is not None else None
    asked = given.spans if given is not None else None
    drawn = draw(reader, rows, sample=SAMPLE, wanted=frozenset(asked or ()))
    sample = [reader.pair(place) for place in drawn.sample]
    channels = Channels(reader, drawn.values, sample, other_runs([Path(folder) for folder in also]), asked)
    pairs: list[ScoredPair] = [reader.pair(place) for place in drawn.places]
    main = channels.channels[0]
    summary = summarise(sample, reader.scorer, limit=main.limit, zero=main.zero, names=names)
    credit = given_credit(given, reader, channels) if given is not None else run.figures()
    data = payload(pairs, drawn, channels, names)
    return _Scores(data, drawn, summary, reader.scorer_name, given, credit, channels.selections)


def _page(run: RunFolder, scores: _Scores | None) -> str:
    environment = Environment(
        loader=PackageLoader("tokenward.report", "assets"), autoescape=True, undefined=StrictUndefined
    )
    # As JSON has it: a space, a line break or a mark that turns the text is seen.
    environment.filters["quoted"] = json.dumps
    assets = files("tokenward.report") / "assets"
    style = (assets / "style.css").read_text(encoding="utf-8")
    parts = [_without_comments((assets / name).read_text(encoding="utf-8")) for name in SCRIPTS if scores]
    script = "\n".join(parts)
    drawn = list(curves(run))
    figures = figure_rows(run.figures())
    return environment.get_template("page.html.jinja").render(
        run=run,
        name=run.path.resolve().name,
        displacement=displacement(run),
        style=style,
        script=script,
        style_hash=_hash(style),
        script_hash=_hash(script),
        scores=scores,
        scorer_note=scorer_note(run, scores.scorer) if scores else "",
        has_known=scores is not None and any(item["kind"] == "known" for item in scores.data["channels"]),
        size_limit=LARGEST,
        shown_replies=REPLIES,
        charts=_charts(scores) if scores else [],
        curves=[line_chart(title, series, x_label="step") for title, series in drawn],
        share_drawn=f"policy: {SHARE}" in dict(drawn),
        figures=figures,
        changes=[row for row in figures if row.before],
        given=scores.given if scores else None,
        made=provenance(run),
        credit=credit_rows(scores.credit) if scores else [],
        replies=run.replies(),
        watched=watched_rows(run),
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


def _without_comments(script: str) -> str:
    """A script without the lines that are comments, which are for those who read the source."""
    return re.sub(r"^[ ]*(?://.*|/\*\*[^*]*(?:\*(?!/)[^*]*)*\*/)\n", "", script, flags=re.MULTILINE)
