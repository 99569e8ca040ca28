"""``tokenward compare A B``: two runs on the same eval rows, paired row by row."""

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.text import Text

from tokenward.artifacts import read_manifest, require
from tokenward.data.files import read_comparisons
from tokenward.display import Display
from tokenward.errors import UserError
from tokenward.evaluation.measures import PAIR, PROMPT, RowKey, read_row_values
from tokenward.evaluation.statistics import Figure, figure_as_json, mean_figure
from tokenward.models.loading import load_tokenizer
from tokenward.report.collect import RunFolder
from tokenward.report.pairs import PairReader, scores_of
from tokenward.report.pieces import eos_count, pieces
from tokenward.tokens.rows import keys_of
from tokenward.tokens.template import Style
from tokenward.tools.finished import recipe_changes, run_folder, run_manifests, trained_stage

FiguresByRow = Mapping[RowKey, Mapping[str, float]]
"""Figures of each eval row, by name."""


class Paired(NamedTuple):
    """A figure of two runs on the same rows: both means, the mean of second minus first per row, and counts of rows."""

    name: str
    first: float
    second: float
    difference: Figure
    higher: int
    lower: int
    equal: int


class Flip(NamedTuple):
    """A row for which a figure has different signs in the two runs."""

    row: RowKey
    figure: str
    first: float
    second: float


class RunComparison(NamedTuple):
    """The result of :func:`compare_runs`.

    Attributes:
        folders: The two runs.
        settings: Recipe values that differ, such as ``policy.objective.gamma: 2 -> 1``.
        figures: Figures that both runs have per row.
        flips: Rows with different signs, the largest difference first.
    """

    folders: tuple[Path, Path]
    settings: list[str]
    figures: list[Paired]
    flips: list[Flip]

    def as_json(self) -> dict[str, Any]:
        """The comparison as one JSON object."""
        figures = {}
        for item in self.figures:
            values = item._asdict()
            figures[values.pop("name")] = {**values, "difference": figure_as_json(item.difference)}
        return {
            "first": str(self.folders[0]),
            "second": str(self.folders[1]),
            "settings": self.settings,
            "figures": figures,
            "flipped": [
                {**flip.row._asdict(), "figure": flip.figure, "first": flip.first, "second": flip.second}
                for flip in self.flips
            ],
        }


def compare_runs(
    first: str | Path, second: str | Path, *, resamples: int = 2000, seed: int = 0
) -> RunComparison:
    """Compare two finished runs on the eval rows that both were evaluated on, with bootstrap intervals.

    Raises:
        UserError: a run has no evaluation, or the runs have different eval rows or templates.
    """
    folders = (run_folder(first), run_folder(second))
    evaluations = [require(folder / "evaluation", "evaluation") for folder in folders]
    before, after = (read_row_values(folder / "evaluation") for folder in folders)
    _check_rows(folders, before, after)
    _check_template(folders)
    metrics = [str(name) for name in evaluations[0].settings["evaluation"]["metrics"]]
    # The preference margin of pairs, and the first metric of prompts, say which rows changed sides.
    signed = [(PAIR, "preference/margin"), *((PROMPT, f"{name}/change") for name in metrics[:1])]
    return RunComparison(
        folders,
        [*recipe_changes(folders), *_code_changes(folders)],
        _figures(before, after, resamples=resamples, seed=seed),
        [flip for kind, name in signed for flip in _flips(before, after, kind, name)],
    )


def _check_rows(folders: Sequence[Path], first: FiguresByRow, second: FiguresByRow) -> None:
    for kind in (PAIR, PROMPT):
        mine, others = ({row for row in values if row.kind == kind} for values in (first, second))
        if mine == others:
            continue
        raise UserError(
            f"{folders[0]} and {folders[1]} were not evaluated on the same {kind}s: {len(mine)} and {len(others)}, of which "
            f"{len(mine & others)} are the same. Give both recipes the same data, seed, tokens and evaluation.prompts, and run "
            "`tokenward evaluate RECIPE` again.",
            code="different-rows",
        )


def _check_template(folders: Sequence[Path]) -> None:
    prints = []
    for folder in folders:
        place = folder / trained_stage(folder)
        style = Style.of_facts(read_manifest(place).facts)
        prints.append(style.template(load_tokenizer(str(place / "model"))).fingerprint)
    if prints[0] != prints[1]:
        raise UserError(
            f"{folders[0]} and {folders[1]} have different tokenizers or chat templates ({prints[0]} and {prints[1]}), so "
            "their log-probabilities and replies cannot be compared. Compare runs of the same model family with the same "
            "tokens.template.",
            code="tokenizer-mismatch",
            key="tokens.template",
        )


def _code_changes(folders: Sequence[Path]) -> list[str]:
    """Files of custom code that differ. A recipe names them but does not hold what is in them."""
    first, second = (run_manifests(folder) for folder in folders)
    changes = [change for name in first if name in second for change in first[name].changes_to(second[name])]
    return list(dict.fromkeys(change for change in changes if change.startswith("input code of ")))


def _figures(first: FiguresByRow, second: FiguresByRow, *, resamples: int, seed: int) -> list[Paired]:
    columns: dict[str, list[tuple[float, float]]] = {}
    for row, values in first.items():
        for name, value in values.items():
            if name in second[row]:
                columns.setdefault(name, []).append((value, second[row][name]))
    found = []
    for name, pairs in columns.items():
        mine, other = np.array(pairs).T
        gap = other - mine
        if name.endswith(("/before", "_before")) and not gap.any():
            continue  # both runs started from the same model
        difference = mean_figure(gap, resamples=resamples, seed=seed)
        counts = (int((gap > 0).sum()), int((gap < 0).sum()), int((gap == 0).sum()))
        found.append(Paired(name, float(mine.mean()), float(other.mean()), difference, *counts))
    return found


def _flips(first: FiguresByRow, second: FiguresByRow, kind: str, name: str) -> list[Flip]:
    flips = [
        Flip(row, name, values[name], second[row][name])
        for row, values in first.items()
        if row.kind == kind and name in values and values[name] * second[row].get(name, 0.0) < 0
    ]
    return sorted(flips, key=lambda flip: -abs(flip.second - flip.first))


def show_comparison(display: Display, found: RunComparison, rows: int) -> None:
    """Show the differences: recipe values, figures, and up to ``rows`` rows per figure that changed sides."""
    display.line(f"A  {found.folders[0]}\nB  {found.folders[1]}")
    changed = [(change,) for change in found.settings] or [("none",)]
    display.table("recipe values that differ, A -> B", ("",), changed)
    lines = [
        (
            item.name,
            f"{item.first:.3f}",
            f"{item.second:.3f}",
            f"{item.difference.value:+.3f}",
            f"{item.difference.low:+.3f} .. {item.difference.high:+.3f}",
            f"{item.higher}/{item.lower}/{item.equal}",
        )
        for item in found.figures
    ]
    display.table("figures on the same rows", ("", "A", "B", "B - A", "95 % interval", "B >/</= A"), lines)
    views = [_Run(folder) for folder in found.folders]
    for figure in dict.fromkeys(flip.figure for flip in found.flips):
        flips = [flip for flip in found.flips if flip.figure == figure]
        display.line(f"\n{len(flips)} rows where {figure} has different signs in A and B")
        for flip in flips[:rows]:
            display.line(f"\n  A {flip.first:+.3f}  B {flip.second:+.3f}")
            show = _show_pair if flip.row.kind == PAIR else _show_replies
            show(display, views, flip.row.key)


class _Run:
    """The eval rows in the folder of a run, for display."""

    def __init__(self, folder: Path) -> None:
        run = RunFolder.read(folder)
        self.replies = {line["key"]: line for line in run.replies()}
        self._reader, self._folder = PairReader.open(run), folder

    @cached_property
    def responses(self) -> dict[str, tuple[str, str]]:
        """Prompt and text of the eval responses, by key."""
        return {
            key: (row.prompt[-1]["content"], text)
            for row in read_comparisons(self._folder / "data" / "eval.jsonl")
            for key, text in zip(keys_of(row), row.responses, strict=True)
        }

    def scored(self, key: str) -> Text:
        """The tokens of a response, coloured by their scores in this run."""
        assert self._reader is not None  # a run with pairs has scores
        record = self._reader.store[key]
        texts = pieces(record.text or self.responses[key][1], record, {})
        first_eos = len(texts) - eos_count(record.text or self.responses[key][1], record)
        scores = scores_of(self._reader.scorer, record).tolist()
        return colour_tokens(texts[:first_eos], scores[:first_eos])


def colour_tokens(texts: Sequence[str], scores: Sequence[float]) -> Text:
    """Tokens on one line: blue and underlined if the score raises the response, orange if it lowers it.

    A score below a tenth of the largest one has no colour.
    """
    least = 0.1 * max(map(abs, scores), default=0.0)
    line = Text()
    for text, score in zip(texts, scores, strict=True):
        style = "" if abs(score) <= least else "blue underline" if score > 0 else "dark_orange"
        line.append(text, style=style)
    return line


def _show_pair(display: Display, views: Sequence[_Run], row: str) -> None:
    keys = row.split("-")
    display.line(f"  prompt: {_shorten(views[0].responses[keys[0]][0])}")
    for name, key in zip(("chosen", "rejected"), keys, strict=True):
        texts = [view.scored(key) for view in views]
        same = texts[0] == texts[1] and texts[0].spans == texts[1].spans
        for label, text in zip(("A and B",) if same else ("A", "B"), texts, strict=False):
            display.text(Text.assemble((f"  {name}, scores of {label}: ", "bold"), text))


def _show_replies(display: Display, views: Sequence[_Run], row: str) -> None:
    lines = [view.replies[row] for view in views]
    # A line of an online run has no prompt, only the key of its example.
    prompt = lines[0]["prompt"][-1]["content"] if "prompt" in lines[0] else lines[0]["key"]
    display.line(f"  prompt: {_shorten(str(prompt))}")
    texts = [str(line["after"]) for line in lines]
    for label, other, mine in (("A", texts[1], texts[0]), ("B", texts[0], texts[1])):
        display.text(Text.assemble((f"  {label}: ", "bold"), mark_changes(other, mine)))


def mark_changes(other: str, mine: str) -> Text:
    """``mine`` with the words that differ from ``other`` in bold and all other words dim."""
    theirs, words = (re.findall(r"\S+\s*", text) for text in (other, mine))
    line = Text()
    for kind, _, _, first, last in difflib.SequenceMatcher(None, theirs, words, autojunk=False).get_opcodes():
        line.append("".join(words[first:last]), style="dim" if kind == "equal" else "bold")
    return line


def _shorten(text: str, longest: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 3]}..."
