"""``tokenward compare A B``: two runs on the same eval rows, paired row by row."""

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.text import Text

from tokenward.artifacts import read_jsonl, read_manifest, require
from tokenward.data.files import read_comparisons
from tokenward.display import Display
from tokenward.errors import UserError
from tokenward.evaluation.measures import PAIR, PROMPT, RowKey, read_row_values
from tokenward.evaluation.statistics import Figure, figure_as_json, mean_figure
from tokenward.models.loading import load_tokenizer
from tokenward.plugins import build
from tokenward.scoring.join import scores_of
from tokenward.scoring.scorers import SCORERS, Scorer, seeded
from tokenward.scoring.store import TokenRecord, TokenStore
from tokenward.tokens.rows import keys_of
from tokenward.tokens.template import Style, Template
from tokenward.tools.finished import (
    changes_of,
    recipes_kept,
    run_folder,
    stage_manifest,
    stages_of,
    trained_stage,
)


class Paired(NamedTuple):
    """One figure of two runs on the same rows.

    Attributes:
        name: As in ``metrics.json``.
        first: Mean of the first run.
        second: Mean of the second run.
        difference: Second less first, by row, with its interval.
        higher: Rows where the second is higher.
        lower: Rows where it is lower.
        equal: The other rows.
    """

    name: str
    first: float
    second: float
    difference: Figure
    higher: int
    lower: int
    equal: int


class Flip(NamedTuple):
    """A row that the two runs see differently.

    Attributes:
        row: Which it is.
        figure: The figure in which they differ.
        first: Its value in the first run.
        second: Its value in the second run.
    """

    row: RowKey
    figure: str
    first: float
    second: float


class RunComparison(NamedTuple):
    """What :func:`compare_runs` found.

    Attributes:
        folders: The two runs.
        settings: Recipe values that differ, such as ``policy.objective.gamma: 2 -> 1``.
        figures: What both have by row.
        flips: Rows that changed sides, the largest difference first.
    """

    folders: tuple[Path, Path]
    settings: list[str]
    figures: list[Paired]
    flips: list[Flip]

    def as_json(self) -> dict[str, Any]:
        """As one JSON object."""
        figures = {
            item.name: {**item._asdict(), "difference": figure_as_json(item.difference)}
            for item in self.figures
        }
        for item in figures.values():
            del item["name"]
        return {
            "first": str(self.folders[0]),
            "second": str(self.folders[1]),
            "settings": self.settings,
            "figures": figures,
            "flipped": [{**flip.row._asdict(), **_without(flip._asdict(), "row")} for flip in self.flips],
        }


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


def compare_runs(
    first: str | Path, second: str | Path, *, resamples: int = 2000, seed: int = 0
) -> RunComparison:
    """Compare two finished runs on the held-out rows that both were evaluated on.

    Args:
        first: A run's folder.
        second: Another one.
        resamples: Bootstrap draws behind an interval.
        seed: Of the draws.

    Raises:
        UserError: a run has no evaluation, or the two were evaluated on other rows or with another template.
    """
    folders = (run_folder(first), run_folder(second))
    evaluations = [require(folder / "evaluation", "evaluation") for folder in folders]
    values = [read_row_values(folder / "evaluation") for folder in folders]
    _check_rows(folders, values[0], values[1])
    _check_template(folders)
    figures = _figures(values[0], values[1], resamples=resamples, seed=seed)
    metrics = [str(name) for name in evaluations[0].settings["evaluation"]["metrics"]]
    flips = _flips(values[0], values[1], metrics)
    return RunComparison(folders, _settings(folders), figures, flips)


def _check_rows(folders: Sequence[Path], first: Mapping[RowKey, Any], second: Mapping[RowKey, Any]) -> None:
    for kind in (PAIR, PROMPT):
        mine, others = ({row for row in values if row.kind == kind} for values in (first, second))
        if mine == others:
            continue
        raise UserError(
            f"{folders[0]} and {folders[1]} were not evaluated on the same {kind}s: {len(mine)} and {len(others)}, of which "
            f"{len(mine & others)} are the same. Give both recipes the same data, seed, tokens and evaluation.prompts, and run "
            "`tokenward evaluate RECIPE` again."
        )


def _check_template(folders: Sequence[Path]) -> None:
    prints = [_template_of(folder).fingerprint for folder in folders]
    if prints[0] != prints[1]:
        raise UserError(
            f"{folders[0]} and {folders[1]} write prompts with another tokenizer or chat template ({prints[0]} and "
            f"{prints[1]}), so their log-probabilities and replies belong to other tokens. Compare runs of one family of models, "
            "with the same tokens.template."
        )


def _template_of(folder: Path) -> Template:
    stage = trained_stage(folder)
    facts = read_manifest(folder / stage).facts
    return Style.of_facts(facts).template(load_tokenizer(str(folder / stage / "model")))


def _settings(folders: Sequence[Path]) -> list[str]:
    """Recipe values that differ, and files of one's own code; of runs without a kept recipe what their stages have."""
    first, second = (stages_of(folder) for folder in folders)
    stages = [*first, *(stage for stage in second if stage not in first)]
    recipes = recipes_kept((folders[0], folders[1]))
    code = [change for change in _of_stages(folders, stages) if change.startswith(CODE)]
    if recipes is not None:
        return [*changes_of(*recipes), *code]
    settings = [change for change in _of_stages(folders, stages) if not change.startswith("input ")]
    return [*settings, *code]


CODE = "input code of "


def _of_stages(folders: Sequence[Path], stages: Sequence[str]) -> list[str]:
    """How the stages' manifests differ, each difference once."""
    found: dict[str, None] = {}
    for stage in stages:
        manifests = [stage_manifest(folder, stage) for folder in folders]
        if manifests[0] is None and manifests[1] is None:
            continue
        if manifests[0] is None or manifests[1] is None:
            found[f"stage {stage}: only in {folders[0 if manifests[0] else 1]}"] = None
            continue
        found |= dict.fromkeys(manifests[0].changes_to(manifests[1]))
    return list(found)


def _figures(
    first: Mapping[RowKey, Mapping[str, float]],
    second: Mapping[RowKey, Mapping[str, float]],
    *,
    resamples: int,
    seed: int,
) -> list[Paired]:
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
            continue  # the same start, the same replies
        difference = mean_figure(gap, resamples=resamples, seed=seed)
        counts = (int((gap > 0).sum()), int((gap < 0).sum()), int((gap == 0).sum()))
        found.append(Paired(name, float(mine.mean()), float(other.mean()), difference, *counts))
    return found


def _flips(
    first: Mapping[RowKey, Mapping[str, float]],
    second: Mapping[RowKey, Mapping[str, float]],
    metrics: Sequence[str],
) -> list[Flip]:
    """Pairs that one run orders rightly and the other does not; prompts whose metric one run raised and the other lowered."""
    wanted = [(PAIR, "preference/margin"), *((PROMPT, f"{name}/change") for name in metrics[:1])]
    return [flip for kind, name in wanted for flip in _flipped(first, second, kind, name)]


def _flipped(
    first: Mapping[RowKey, Mapping[str, float]],
    second: Mapping[RowKey, Mapping[str, float]],
    kind: str,
    name: str,
) -> list[Flip]:
    flips = [
        Flip(row, name, values[name], second[row][name])
        for row, values in first.items()
        if row.kind == kind and name in values and values[name] * second[row].get(name, 0.0) < 0
    ]
    return sorted(flips, key=lambda flip: -abs(flip.second - flip.first))


RAISES, LOWERS = "blue", "dark_orange"
FAINT = 0.1
"""A score under this share of the largest one beside it gets no colour."""


def show_comparison(display: Display, found: RunComparison, rows: int) -> None:
    """Show what differs: recipe values, figures, and so many rows that changed sides.

    Args:
        display: The screen.
        found: The comparison.
        rows: Of each kind of row.
    """
    display.line(f"A  {found.folders[0]}\nB  {found.folders[1]}")
    changed = [(change,) for change in found.settings] or [("nothing",)]
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
    columns = ("", "A", "B", "B - A", "95 %", "B >/</= A")
    display.table("the same rows in both runs", columns, lines)
    _show_flips(display, found, rows)


def _show_flips(display: Display, found: RunComparison, rows: int) -> None:
    sides = [RunView(folder) for folder in found.folders]
    for figure in dict.fromkeys(flip.figure for flip in found.flips):
        flips = [flip for flip in found.flips if flip.figure == figure]
        display.line(f"\n{len(flips)} rows on which {figure} has another sign in A and B")
        for flip in flips[:rows]:
            display.line(f"\n  A {flip.first:+.3f}  B {flip.second:+.3f}")
            show = _show_pair if flip.row.kind == PAIR else _show_replies
            show(display, sides, flip)


class EvalResponse(NamedTuple):
    """A held-out response."""

    prompt: str
    text: str


class RunView:
    """What a run's folder holds of its held-out rows.

    Args:
        folder: The run's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def replies(self) -> dict[str, dict[str, Any]]:
        """Lines of the evaluation's samples, by key."""
        return {line["key"]: line for line in read_jsonl(self._folder / "evaluation" / "samples.jsonl")}

    @cached_property
    def responses(self) -> dict[str, EvalResponse]:
        """Held-out responses, by key."""
        return {
            key: EvalResponse(row.prompt[-1]["content"], text)
            for row in read_comparisons(self._folder / "data" / "eval.jsonl")
            for key, text in zip(keys_of(row), row.responses, strict=True)
        }

    @cached_property
    def scorer(self) -> Scorer:
        """The run's scorer."""
        settings = read_manifest(self._folder / "policy").settings
        table = seeded(settings["scores"]["scorer"], settings["seed"])
        return build("scorer", table.pop("name"), table, SCORERS)

    @cached_property
    def store(self) -> TokenStore:
        """The run's score store."""
        return TokenStore(self._folder / "scores")

    def scored(self, key: str) -> Text:
        """A response's tokens, coloured by the score that this run gave them."""
        record = self.store[key]
        return coloured(
            token_texts(record, record.text or self.responses[key].text),
            scores_of(self.scorer, record).tolist(),
        )


def token_texts(record: TokenRecord, text: str) -> list[str]:
    """The text of each stored token; empty for one that is no text."""
    raw = text.encode()
    return [
        raw[start:end].decode(errors="replace") for start, end in zip(record.start, record.end, strict=True)
    ]


def coloured(texts: Sequence[str], scores: Sequence[float]) -> Text:
    """Tokens in a line: blue and underlined where the score raises the response, orange where it lowers it."""
    least = FAINT * max(map(abs, scores), default=0.0)
    line = Text()
    for text, score in zip(texts, scores, strict=True):
        style = "" if abs(score) <= least else f"{RAISES} underline" if score > 0 else LOWERS
        line.append(text, style=style)
    return line


def _show_pair(display: Display, sides: Sequence[RunView], flip: Flip) -> None:
    keys = flip.row.key.split("-")
    display.line(f"  prompt: {_short(sides[0].responses[keys[0]].prompt)}")
    for name, key in zip(("chosen", "rejected"), keys, strict=True):
        views = [side.scored(key) for side in sides]
        same = views[0] == views[1] and views[0].spans == views[1].spans
        for label, view in zip(("A, B",) if same else ("A", "B"), views, strict=False):
            display.text(Text.assemble((f"  {name}, scores of {label}: ", "bold"), view))


def _show_replies(display: Display, sides: Sequence[RunView], flip: Flip) -> None:
    lines = [side.replies[flip.row.key] for side in sides]
    display.line(f"  prompt: {_short(_prompt_of(lines[0]))}")
    texts = [str(line["after"]) for line in lines]
    for label, other, mine in (("A", texts[1], texts[0]), ("B", texts[0], texts[1])):
        display.text(Text.assemble((f"  {label}: ", "bold"), different_words(other, mine)))


def _prompt_of(line: Mapping[str, Any]) -> str:
    # An online run's line names its example by key alone.
    return str(line["prompt"][-1]["content"]) if "prompt" in line else str(line["key"])


def different_words(other: str, mine: str) -> Text:
    """``mine`` with the words that ``other`` does not have in that place in bold, the rest dim."""
    theirs, words = (re.findall(r"\S+\s*", text) for text in (other, mine))
    line = Text()
    for kind, _, _, first, last in difflib.SequenceMatcher(None, theirs, words, autojunk=False).get_opcodes():
        line.append("".join(words[first:last]), style="dim" if kind == "equal" else "bold")
    return line


def _short(text: str, longest: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 3]}..."
