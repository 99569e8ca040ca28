"""Tables and pictures of a study: means with intervals, paired differences, and the mean of each seed."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

from studies.arms import START, Outcome
from tokenward.artifacts import atomic_write
from tokenward.evaluation.statistics import Figure, mean_figure

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the backend is chosen: a study runs without a screen
from matplotlib.axes import Axes

QUANTITIES = {"vader": 3, "kl": 2, "length": 1, "ended": 2}
"""Quantities measured for each reply, and the digits to print."""

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6c6c6c", "#000000", "#8c510a"]
MARKERS = "osD^vP*Xhd<>p8"


def arms_of(outcomes: Sequence[Outcome]) -> list[str]:
    """Names of the arms in their order, the start first."""
    return list(dict.fromkeys(outcome.arm for outcome in outcomes))


def pooled(outcomes: Sequence[Outcome], arm: str, quantity: str) -> np.ndarray:
    """One number per eval prompt, for all seeds."""
    return np.concatenate([item.values[quantity] for item in outcomes if item.arm == arm])


def figure(outcomes: Sequence[Outcome], arm: str, quantity: str) -> Figure:
    """Mean over prompts and seeds. The interval resamples prompts and treats the seeds as fixed."""
    return mean_figure(pooled(outcomes, arm, quantity))


def difference(outcomes: Sequence[Outcome], arm: str, other: str, quantity: str) -> Figure:
    """Mean paired difference of two arms, on the same prompts of the same seeds."""
    return mean_figure(pooled(outcomes, arm, quantity) - pooled(outcomes, other, quantity))


def cell(found: Figure, digits: int) -> str:
    """A figure with its interval."""
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def by_seed(outcomes: Sequence[Outcome], arm: str, quantity: str) -> list[float]:
    """The mean of each seed."""
    return [float(np.mean(item.values[quantity])) for item in outcomes if item.arm == arm]


def table(outcomes: Sequence[Outcome], *, against: str) -> list[str]:
    """Markdown table of every arm, with its difference in reward to the arm ``against``."""
    names = arms_of(outcomes)
    head = ["arm", "VADER", f"minus {against}", "VADER of each seed", "KL to the start", "length", "ended"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in names:
        cells = {key: cell(figure(outcomes, name, key), digits) for key, digits in QUANTITIES.items()}
        change = "" if name == against else cell(difference(outcomes, name, against, "vader"), 3)
        seeds = ", ".join(f"{value:.3f}" for value in by_seed(outcomes, name, "vader"))
        row = [name, cells["vader"], change, seeds, cells["kl"], cells["length"], cells["ended"]]
        lines.append("| " + " | ".join(row) + " |")
    seeds = sorted({item.seed for item in outcomes})
    count = len(pooled(outcomes, names[0], "vader"))
    note = f"n = {count} replies per arm; all arms of a seed use the same eval prompts. Seeds: {', '.join(map(str, seeds))}."
    return [*lines, "", note]


MOST_MARKED = 14
"""With more arms than this, points are labelled with names instead of markers, and have no intervals."""

TICKS = (0, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Ticks of KL in a picture of many arms: denser up to 2, where most arms are."""


def _named_points(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    """Draw each arm's mean, labelled with its name."""
    points = {
        name: (figure(outcomes, name, "kl").value, figure(outcomes, name, "vader").value)
        for name in arms_of(outcomes)
    }
    kls, rewards = zip(*points.values(), strict=True)
    end = 1.3 * max(*kls, 1.0)
    ticks = [tick for tick in TICKS if tick <= end]
    axes.set_xscale("symlog", linthresh=1.0, linscale=0.3)
    axes.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    axes.set_xlim(-0.1, end)
    axes.scatter(kls, rewards, s=28, color=COLOURS[0])
    gap = 0.021 * (max(rewards) - min(rewards))  # height of a label
    middle = float(np.median(kls))
    taken = {"left": float("-inf"), "right": float("-inf")}
    for name, (kl, reward) in sorted(points.items(), key=lambda item: item[1][1]):
        side = "right" if 0 < kl < middle else "left"  # whether the label ends or begins at the point
        taken[side] = max(reward, taken[side] + gap)
        axes.text(kl, taken[side], f"   {name}   ", fontsize=9, ha=side, va="center")


def _marked_points(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    """Draw each arm's mean with intervals, and small points for its seeds."""
    for place, name in enumerate(arms_of(outcomes)):
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        reward, kl = (figure(outcomes, name, key) for key in ("vader", "kl"))
        axes.errorbar(
            kl.value,
            reward.value,
            xerr=[[kl.value - kl.low], [kl.high - kl.value]],
            yerr=[[reward.value - reward.low], [reward.high - reward.value]],
            color=colour,
            marker=marker,
            markersize=8,
            capsize=2,
            linewidth=1,
            label=name,
        )
        axes.scatter(
            by_seed(outcomes, name, "kl"),
            by_seed(outcomes, name, "vader"),
            color=colour,
            marker=marker,
            s=14,
            alpha=0.45,
        )
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def draw(outcomes: Sequence[Outcome], file: Path, title: str) -> None:
    """Plot reward against KL to the start, one point per arm."""
    crowded = len(arms_of(outcomes)) > MOST_MARKED
    fig, axes = plt.subplots(figsize=(9, 8) if crowded else (8, 5.2), layout="constrained")
    (_named_points if crowded else _marked_points)(axes, outcomes)
    axes.set_xlabel("KL(policy || start) of a reply, nats")
    axes.set_ylabel("VADER of the replies")
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    file.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(file, dpi=110)
    plt.close(fig)


def write(page: Path, study: str, lines: Sequence[str]) -> None:
    """Write a study's table between its markers in a page.

    Raises:
        SystemExit: The page has no such markers.
    """
    begin, end = f"<!-- study: {study} -->", "<!-- end of study -->"
    text = page.read_text(encoding="utf-8")
    if begin not in text or end not in text.split(begin, 1)[1]:
        raise SystemExit(f"{page} has no markers for the study. Add {begin} and {end}.")
    before, rest = text.split(begin, 1)
    after = rest.split(end, 1)[1]
    body = "\n".join(lines)
    atomic_write(page, f"{before}{begin}\n\n{body}\n\n{end}{after}")


def publish(
    study: str,
    outcomes: Sequence[Outcome],
    chosen: argparse.Namespace,
    *,
    against: str,
    title: str,
    more: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Print a study's table, and write table and picture to the page and folder of the command line.

    Args:
        study: Name of the study in markers and files.
        outcomes: Measurements of all arms.
        chosen: From :func:`studies.arms.options`.
        against: See :func:`table`.
        title: Title of the picture.
        more: Further lines under the table, by heading.
    """
    lines = table(outcomes, against=against)
    for heading, extra in (more or {}).items():
        lines += ["", f"**{heading}**", "", *extra]
    print("\n".join(lines))
    if chosen.page is not None:
        write(chosen.page, study, lines)
    if chosen.pictures is not None:
        draw(outcomes, chosen.pictures / f"study_{study}.png", title)


__all__ = ["START", "publish", "table"]
