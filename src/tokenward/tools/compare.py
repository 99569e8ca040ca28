"""``tokenward compare A B``: two runs on the same held-out rows, paired row by row."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenward.artifacts import read_manifest, require
from tokenward.errors import UserError
from tokenward.evaluation.row_values import PAIR, PROMPT, RowKey, read_row_values
from tokenward.evaluation.statistics import Figure, figure_as_json, mean_figure
from tokenward.models.loading import load_tokenizer
from tokenward.tokens.template import Style, Template
from tokenward.tools.kept import (
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
