"""Tables and pictures of the study."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

from studies.frontier.arms import ARMS, Arm
from studies.frontier.curves import TARGETS, Measured, figure
from studies.frontier.world import best_of_kl
from studies.tables import COLOURS, cell

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the backend is chosen: a study runs without a screen

BASES = ("dpo", "simpo")
VARIANTS = ("dpo", "dpo_b03", "dpo_b1", "dpo_falls", "dpo_b03_falls", "dpo_falls3")
"""DPO with all settings that were tried."""
ONLINE_BASE = "rl_reward"
"""The online arm that the others are compared with where their trainings end."""
GRID = np.geomspace(0.3, 40, 40)
NAMES = {"vader": "VADER sentiment", "dense": "dense reward", "people": "people's reward"}


class Row(NamedTuple):
    """An arm with the measurements that its figures come from.

    Attributes:
        arm: The arm.
        found: Those of all seeds, or of fewer if it was not measured with all.
        title: In tables.
    """

    arm: Arm
    found: Measured
    title: str


def rows_of(found: Measured, fewer: Measured | None = None) -> list[Row]:
    """The arms that were measured, each with all seeds, or else with fewer, which its title then says."""
    rows = [Row(arm, found, arm.title) for arm in ARMS.values() if found.has(arm.name)]
    if fewer is not None:
        known = {row.arm.name for row in rows}
        rows += [
            Row(arm, fewer, f"{arm.title} (seeds {_listed(fewer.seeds)})")
            for arm in ARMS.values()
            if arm.name not in known and fewer.has(arm.name)
        ]
    return rows


def lines_of(found: Measured, fewer: Measured | None = None) -> list[str]:
    """Markdown tables: rewards at equal KL, and their differences to DPO and SimPO.

    Args:
        found: The measurements.
        fewer: Those of fewer seeds, for arms that were not measured with all.
    """
    rows = rows_of(found, fewer)
    far = [row for row in rows if row.found.rewards(row.arm.name, TARGETS[0]) is not None]
    near = [row.title for row in rows if row not in far]
    kls = [f"{target:g} nats" for target in TARGETS]
    lines = ["Reward at equal KL to the start:", "", *_head(["method", *kls])]
    lines.append(_row([_limit_title(found), *(_limit(found, target) for target in TARGETS)]))
    lines += [_row([row.title, *_rewards(row)]) for row in far]
    for base in BASES:
        if found.has(base):
            title = f"Minus {ARMS[base].title} at the same KL; in brackets the part of its distance to best-of-N that this is:"
            differences = (_row(_differences(row, base)) for row in far if row.arm.name != base)
            lines += ["", title, "", *_head(["method", *kls]), *differences]
    variants = [name for name in VARIANTS if found.has(name)]
    online = [row for row in far if row.arm.group == "online"]
    if len(variants) > 1 and online:
        title = f"Minus the best of these at the same KL: {'; '.join(ARMS[name].title for name in variants)}."
        differences = (_row(_differences(row, *variants)) for row in online)
        lines += ["", title, "", *_head(["method", *kls]), *differences]
    lines += _ends([row for row in rows if row.arm.group == "online"])
    return [*lines, "", " ".join(_notes(found, fewer, rows, near))]


def _notes(found: Measured, fewer: Measured | None, rows: Sequence[Row], near: Sequence[str]) -> list[str]:
    """What the tables hold and what they leave out."""
    notes = [
        f"Seeds {_listed(found.seeds)}; n = {found.prompts} replies a method and point. Intervals are over seeds and prompts. "
        f"The start has {found.start:.3f}. A dash: no training got that far with every seed. "
        "~: read between the start and the first measured point, where the path is not known."
    ]
    if fewer is not None and any(row.found is fewer for row in rows):
        notes.append(
            f"Rows that say so have seeds {_listed(fewer.seeds)} alone, n = {fewer.prompts}, and so have their differences."
        )
    if near:
        notes.append(f"Not even {TARGETS[0]:g} nats: {'; '.join(near)}.")
    known = {row.arm.name for row in rows}
    some = [arm.title for arm in ARMS.values() if arm.name not in known and found.has_some(arm.name)]
    if some:
        notes.append(f"Measured with some of the seeds, and not in these tables: {'; '.join(some)}.")
    return notes


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _rewards(row: Row) -> list[str]:
    name, found = row.arm.name, row.found
    return [_at(found, found.rewards(name, target), target, name) for target in TARGETS]


def _ends(rows: Sequence[Row]) -> list[str]:
    """Where online trainings end: minus DPO at the same distance, and minus :data:`ONLINE_BASE` with the same factor of the KL penalty.

    Only arms with its rewards are compared with it: to others, the same factor is another penalty.
    """
    base = next((row for row in rows if row.arm.name == ONLINE_BASE), None)
    if base is None:
        return []
    alike = [row for row in rows if row.arm.body["scores"] == base.arm.body["scores"]]
    controlled = len(alike) > 1
    about = "Where trainings on own replies end, each with one factor of the KL penalty; in brackets the part of DPO's distance to best-of-N that this is"
    about += f". The first is {base.arm.title}, with the same factor:" if controlled else ":"
    columns = ["method", "factor", "reward", "minus DPO there", "KL, nats"]
    columns += ["reward minus the first", "KL minus the first"] if controlled else []
    heading = ["### Where trainings on own replies end", ""] if controlled else []
    lines = ["", *heading, about, "", *_head(columns)]
    listed = [(penalty, row) for penalty in base.found.penalties(ONLINE_BASE) for row in alike]
    others = [row for row in rows if row not in alike]
    listed += [(penalty, row) for row in others for penalty in row.found.penalties(row.arm.name)]
    for penalty, row in listed:
        found, name = row.found, row.arm.name
        if penalty not in found.penalties(name):
            continue
        own, there = found.end(name, penalty), found.minus_at_its_end(name, penalty, "dpo")
        minus = ["", ""] if controlled else []
        if row in alike and row is not base:
            first = found.end(ONLINE_BASE, penalty)
            minus = [_cell(own.reward - first.reward, found), _cell(own.kl - first.kl, found)]
        of_dpo, kl = _cell(None, found), float(own.kl[0])
        if there is not None:
            share = there.gain[0] / (found.limit(kl)[0] - own.reward[0] + there.gain[0])
            of_dpo = ("" if there.measured else "~") + _cell(there.gain, found)
            of_dpo += f" ({share:.0%})" if kl <= best_of_kl(found.largest) else ""
        cells = [_cell(own.reward, found), of_dpo, _cell(own.kl, found), *minus]
        lines.append(_row([row.title, f"{penalty:g}", *cells]))
    return lines


def short_lines(found: Measured, fewer: Measured | None = None) -> list[str]:
    """A Markdown table of the differences to DPO alone, from the best at 5 nats down, or at the furthest distance before."""
    rows = [row for row in rows_of(found, fewer) if row.arm.name != "dpo"]
    gains = {
        row.arm.name: [row.found.minus(row.arm.name, "dpo", target) for target in TARGETS] for row in rows
    }
    reached = [row for row in rows if gains[row.arm.name][0] is not None]

    def middle(row: Row) -> float:
        near = gains[row.arm.name][: TARGETS.index(5.0) + 1]
        return -float(next(gain[0] for gain in reversed(near) if gain is not None))

    lines = _head(["minus DPO at", *(f"{target:g} nats" for target in TARGETS)])
    for row in sorted(reached, key=middle):
        cells = [
            _at(row.found, gain, target, row.arm.name, "dpo")
            for target, gain in zip(TARGETS, gains[row.arm.name], strict=True)
        ]
        lines.append(_row([row.title, *cells]))
    return lines


def _head(names: Sequence[str]) -> list[str]:
    return [_row(names), "|" + "---|" * len(names)]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _limit_title(found: Measured) -> str:
    return f"best-of-N sampling from the start, N up to {found.largest}"


def _limit(found: Measured, target: float) -> str:
    return ("" if target <= best_of_kl(found.largest) else "more than ") + _cell(found.limit(target), found)


def _cell(resamples: np.ndarray | None, found: Measured) -> str:
    return "\u2013" if resamples is None else cell(figure(resamples, found.prompts), 3)


def _at(found: Measured, resamples: np.ndarray | None, target: float, *arms: str) -> str:
    """A figure at a KL, with a mark if an arm that it rests on was not measured before that KL."""
    unknown = resamples is not None and not all(found.is_measured(arm, target) for arm in arms)
    return ("~" if unknown else "") + _cell(resamples, found)


def _differences(row: Row, *bases: str) -> list[str]:
    found, cells, furthest = row.found, [row.title], best_of_kl(row.found.largest)
    for target in TARGETS:
        base = found.best(bases, target)
        gain = None if base is None else found.minus(row.arm.name, base, target)
        other = None if base is None else found.rewards(base, target)
        if base is None or gain is None or other is None:
            cells.append("\u2013")
            continue
        share = gain[0] / (found.limit(target)[0] - other[0])
        cells.append(
            _at(found, gain, target, row.arm.name, base) + (f" ({share:.0%})" if target <= furthest else "")
        )
    return cells


def draw(found: Measured, names: Sequence[str], file: Path, title: str, reward: str) -> None:
    """Plot reward against KL: a curve with a band for each method, and the limit of best-of-N sampling."""
    fig, axes = plt.subplots(figsize=(8.4, 5.4), layout="constrained")
    measured = GRID[best_of_kl(found.largest) >= GRID]
    limit = [figure(found.limit(kl), 0).value for kl in measured]
    axes.plot(measured, limit, color="black", linestyle="--", label=_limit_title(found))
    for place, name in enumerate(name for name in names if found.has(name)):
        curve = [(kl, figure(rewards, 0)) for kl in GRID if (rewards := found.rewards(name, kl)) is not None]
        kls, colour = [kl for kl, _ in curve], COLOURS[place % len(COLOURS)]
        known = [one.value if found.is_measured(name, kl) else np.nan for kl, one in curve]
        axes.plot(kls, known, color=colour, label=ARMS[name].title)
        axes.plot(kls, [one.value for _, one in curve], color=colour, linestyle=":", linewidth=1)
        axes.fill_between(
            kls,
            [one.low for _, one in curve],
            [one.high for _, one in curve],
            color=colour,
            alpha=0.18,
            linewidth=0,
        )
    axes.axhline(found.start, color="#9a9a9a", linewidth=0.8)
    axes.annotate(
        "the start",
        (GRID[0], found.start),
        textcoords="offset points",
        xytext=(2, -11),
        color="#6c6c6c",
        fontsize=9,
    )
    axes.set_xscale("log")
    ticks = (0.3, 0.5, 1, 2, 5, 10, 20, 40)
    axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("distance from the start: KL of a reply, nats")
    axes.set_ylabel(f"mean {NAMES[reward]} of replies to held-out prompts")
    axes.set_title(title, fontsize=11, loc="left")
    axes.grid(alpha=0.25)
    axes.legend(facecolor="white", edgecolor="none", framealpha=0.9, fontsize=9, loc="lower right")
    file.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(file, dpi=120)
    plt.close(fig)
