"""Tables and picture of the study."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from studies.planted.credit import by_type, credit
from studies.planted.learning import ALONE, METHODS, OWN, Cell, Cells, Sizes, run
from studies.planted.worlds import WORLDS, K
from tokenward.evaluation.statistics import Figure, mean_figure


def pooled(cells: Sequence[Cell]) -> Figure:
    """Mean accuracy over the eval groups of all seeds."""
    return mean_figure(np.concatenate([cell.accuracy for cell in cells]))


def difference(first: Sequence[Cell], second: Sequence[Cell]) -> Figure:
    """Mean difference in accuracy, group by group."""
    pairs = zip(first, second, strict=True)
    return mean_figure(np.concatenate([one.accuracy - other.accuracy for one, other in pairs]))


def shown(figure: Figure, digits: int = 3) -> str:
    """A figure with its interval."""
    return f"{figure.value:.{digits}f} ({figure.low:.{digits}f} .. {figure.high:.{digits}f})"


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def accuracy_table(cells: Cells) -> str:
    """Rank accuracy of every method in every case; bold if the aggregate matches the case."""

    def entry(name: str, case: str) -> str:
        text = shown(pooled(cells[case, name]))
        return f"**{text}**" if name.split()[0].rstrip(",") == OWN[case] else text

    return table(
        ["aggregate", *WORLDS], [[name, *(entry(name, case) for case in WORLDS)] for name in METHODS]
    )


def length_table(cells: Cells, fresh: dict[str, list[Cell]]) -> str:
    """Share of pairs in which the longer sequence gets the higher ``e``, before and after training."""

    def share(found: Sequence[Cell]) -> str:
        return f"{np.mean([cell.longer.mean() for cell in found]):.3f}"

    lines = [[name, share(fresh[name]), *(share(cells[case, name]) for case in WORLDS)] for name in METHODS]
    return table(["aggregate", "untrained", *WORLDS], lines)


def outsider(cells: Cells, case: str) -> str:
    """The best method whose aggregate does not match the case."""
    others = [name for name in METHODS if not name.startswith(OWN[case])]
    return max(others, key=lambda name: pooled(cells[case, name]).value)


def difference_table(cells: Cells) -> str:
    """The matching aggregate against the best other one."""
    lines = []
    for case, own in OWN.items():
        other = outsider(cells, case)
        for name in (name for name in METHODS if name.startswith(own)):
            found = difference(cells[case, name], cells[case, other])
            lines.append([case, name, other, shown(found), str(found.n)])
    return table(["case", "matching aggregate", "best other aggregate", "difference", "n groups"], lines)


def spread(values: Sequence[float]) -> str:
    """Mean, lowest and highest value over seeds."""
    if np.isnan(values).any():
        return "-"
    return f"{np.mean(values):.3f} ({min(values):.3f} .. {max(values):.3f})"


def credit_line(case: str, name: str, cells: Sequence[Cell]) -> list[str]:
    """Accuracy, and agreement of token rewards with planted scores, as one row."""
    columns = zip(*map(credit, cells), strict=True)
    tokens = sum(len(cell.learned) for cell in cells)
    return [case, name, f"{pooled(cells).value:.3f}", *map(spread, columns), str(tokens)]


def credit_table(lines: Sequence[Sequence[str]]) -> str:
    """Table of rows from :func:`credit_line`."""
    head = ["case", "aggregate", "rank accuracy", "Pearson", "Spearman", "Spearman by score"]
    marked = ["Spearman, score not 0", "AUROC, score not 0", "Pearson with the extreme so far"]
    return table([*head, *marked, "n tokens"], lines)


def credits_of(cells: Cells, seeds: Sequence[int], sizes: Sizes) -> str:
    """Table of the matching aggregates, the average, and the matching aggregate without attention."""
    lines = []
    for case, own in OWN.items():
        names = [name for name in METHODS if name.startswith(own) or name == "average"]
        lines += [credit_line(case, name, cells[case, name]) for name in names]
        if case in ALONE:
            method = METHODS[ALONE[case]]._replace(attention=False)
            found = [run(case, method, seed, sizes) for seed in seeds]
            lines.append(credit_line(case, f"{ALONE[case]}, no attention", found))
    return credit_table(lines)


def sweep_table(seeds: Sequence[int], sizes: Sizes) -> str:
    """Group sizes at an equal number of ranked sequences, in training and per step. Eval groups have five."""
    lines = []
    for case, name in (("mean", "average"), ("keyword", "softmax 0.1")):
        for k in (2, 3, 5, 10):
            same = sizes._replace(k=k, groups=sizes.groups * K // k, batch=sizes.batch * K // k)
            found = pooled([run(case, METHODS[name], seed, same) for seed in seeds])
            lines.append([case, name, str(k), str(same.groups), shown(found), str(found.n)])
    return table(["case", "aggregate", "K", "groups", "rank accuracy", "n eval groups"], lines)


def picture(cells: Cells, path: Path) -> None:
    """Draw the accuracy of every method in every case, and learned against planted scores of the matching aggregate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 8.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.25, 1])
    _heat(upper.subplots(), cells)
    for axes, (case, name) in zip(lower.subplots(1, 3), ALONE.items(), strict=True):
        _scatter(axes, cells[case, name], case, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


TITLES = {
    "mean": "mean of the scores",
    "sum": "sum of the scores",
    "present": "keyword occurs or not",
    "keyword": "strongest keyword",
    "worst": "worst token",
}


def _heat(axes: Any, cells: Cells) -> None:
    values = np.array([[pooled(cells[case, name]).value for case in WORLDS] for name in METHODS])
    image = axes.imshow(values, cmap="cividis", vmin=0.5, vmax=1.0, aspect="auto")
    axes.set_xticks(range(len(WORLDS)), [TITLES[case] for case in WORLDS])
    axes.set_yticks(range(len(METHODS)), list(METHODS))
    axes.set_xlabel("what the sequences are ranked by")
    for row, name in enumerate(METHODS):
        for column, case in enumerate(WORLDS):
            own = name.split()[0].rstrip(",") == OWN[case]
            axes.text(
                column,
                row,
                f"{values[row, column]:.3f}" + (" *" if own else ""),
                ha="center",
                va="center",
                weight="bold" if own else "normal",
                color="black" if values[row, column] > 0.75 else "white",
            )
    axes.set_title("Rank accuracy on the eval groups, chance 0.5 (* the aggregate that matches the case)")
    axes.figure.colorbar(image, ax=axes, shrink=0.9, label="rank accuracy")


def _scatter(axes: Any, cells: Sequence[Cell], case: str, name: str) -> None:
    marks = zip(cells, ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"), "os^Dv", strict=False)
    for number, (cell, colour, mark) in enumerate(marks):
        learned, planted = by_type(cell)
        axes.scatter(planted, learned, s=22, c=colour, marker=mark, alpha=0.7, label=f"seed {number}")
    axes.set_title(f"{TITLES[case]}: {name}")
    axes.set_xlabel("planted score of the token type")
    axes.set_ylabel("mean learned reward")
    axes.legend(frameon=False)
