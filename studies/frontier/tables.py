"""Tables and pictures of the study."""

from collections.abc import Sequence
from pathlib import Path

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


def lines_of(found: Measured) -> list[str]:
    """Markdown tables: rewards at equal KL, and their differences to DPO and SimPO."""
    arms = [arm for arm in ARMS.values() if found.has(arm.name)]
    far = [arm for arm in arms if found.rewards(arm.name, TARGETS[0]) is not None]
    near = [arm.title for arm in arms if arm not in far]
    kls = [f"{target:g} nats" for target in TARGETS]
    lines = ["Reward at equal KL to the start:", "", *_head(["method", *kls])]
    lines.append(_row([_limit_title(found), *(_limit(found, target) for target in TARGETS)]))
    lines += [
        _row(
            [
                arm.title,
                *(_at(found, found.rewards(arm.name, target), target, arm.name) for target in TARGETS),
            ]
        )
        for arm in far
    ]
    for base in BASES:
        if found.has(base):
            title = f"Minus {ARMS[base].title} at the same KL; in brackets the part of its distance to best-of-N that this is:"
            rows = (_row(_differences(found, arm, base)) for arm in far if arm.name != base)
            lines += ["", title, "", *_head(["method", *kls]), *rows]
    variants = [name for name in VARIANTS if found.has(name)]
    online = [arm for arm in far if arm.group == "online"]
    if len(variants) > 1 and online:
        title = f"Minus the best of these at the same KL: {'; '.join(ARMS[name].title for name in variants)}."
        rows = (_row(_differences(found, arm, *variants)) for arm in online)
        lines += ["", title, "", *_head(["method", *kls]), *rows]
    lines += _ends(found, [arm for arm in arms if arm.group == "online"])
    return [*lines, "", " ".join(_notes(found, near))]


def _notes(found: Measured, near: Sequence[str]) -> list[str]:
    """What the tables hold and what they leave out."""
    notes = [
        f"Seeds {', '.join(map(str, found.seeds))}; n = {found.prompts} replies a method and point. Intervals are over seeds and prompts. "
        f"The start has {found.start:.3f}. A dash: no training got that far with every seed. "
        "~: read between the start and the first measured point, where the path is not known."
    ]
    notes += [f"Not even {TARGETS[0]:g} nats: {'; '.join(near)}."] if near else []
    some = [arm.title for arm in ARMS.values() if not found.has(arm.name) and found.has_some(arm.name)]
    notes += [f"Measured with some of the seeds, and not in these tables: {'; '.join(some)}."] if some else []
    return notes


def _ends(found: Measured, arms: Sequence[Arm]) -> list[str]:
    """Where online trainings end: minus DPO at the same distance, and minus :data:`ONLINE_BASE` with the same factor of the KL penalty.

    Only arms with its rewards are compared with it: to others, the same factor is another penalty.
    """
    base = next((arm for arm in arms if arm.name == ONLINE_BASE), None)
    if base is None:
        return []
    alike = [arm for arm in arms if arm.body["scores"] == base.body["scores"]]
    controlled = len(alike) > 1
    about = "Where trainings on own replies end, each with one factor of the KL penalty; in brackets the part of DPO's distance to best-of-N that this is"
    about += f". The first is {base.title}, with the same factor:" if controlled else ":"
    columns = ["method", "factor", "reward", "minus DPO there", "KL, nats"]
    columns += ["reward minus the first", "KL minus the first"] if controlled else []
    heading = ["### Where trainings on own replies end", ""] if controlled else []
    lines = ["", *heading, about, "", *_head(columns)]
    listed = [(penalty, arm) for penalty in found.penalties(ONLINE_BASE) for arm in alike]
    listed += [(penalty, arm) for arm in arms if arm not in alike for penalty in found.penalties(arm.name)]
    for penalty, arm in listed:
        if penalty not in found.penalties(arm.name):
            continue
        own, there = found.end(arm.name, penalty), found.minus_at_its_end(arm.name, penalty, "dpo")
        minus = ["", ""] if controlled else []
        if arm in alike and arm is not base:
            first = found.end(ONLINE_BASE, penalty)
            minus = [_cell(own.reward - first.reward, found), _cell(own.kl - first.kl, found)]
        of_dpo, kl = _cell(None, found), float(own.kl[0])
        if there is not None:
            share = there.gain[0] / (found.limit(kl)[0] - own.reward[0] + there.gain[0])
            of_dpo = ("" if there.measured else "~") + _cell(there.gain, found)
            of_dpo += f" ({share:.0%})" if kl <= best_of_kl(found.largest) else ""
        cells = [_cell(own.reward, found), of_dpo, _cell(own.kl, found), *minus]
        lines.append(_row([arm.title, f"{penalty:g}", *cells]))
    return lines


def short_lines(found: Measured) -> list[str]:
    """A Markdown table of the differences to DPO alone, from the best at 5 nats down, or at the furthest distance before."""
    arms = [arm for arm in ARMS.values() if arm.name != "dpo" and found.has(arm.name)]
    gains = {arm.name: [found.minus(arm.name, "dpo", target) for target in TARGETS] for arm in arms}
    reached = [arm for arm in arms if gains[arm.name][0] is not None]

    def middle(arm: Arm) -> float:
        near = gains[arm.name][: TARGETS.index(5.0) + 1]
        return -float(next(gain[0] for gain in reversed(near) if gain is not None))

    reached.sort(key=middle)
    rows = [
        _row(
            [
                arm.title,
                *(
                    _at(found, gain, target, arm.name, "dpo")
                    for target, gain in zip(TARGETS, gains[arm.name], strict=True)
                ),
            ]
        )
        for arm in reached
    ]
    return [*_head(["minus DPO at", *(f"{target:g} nats" for target in TARGETS)]), *rows]


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


def _differences(found: Measured, arm: Arm, *bases: str) -> list[str]:
    cells, furthest = [arm.title], best_of_kl(found.largest)
    for target in TARGETS:
        base = found.best(bases, target)
        gain = None if base is None else found.minus(arm.name, base, target)
        other = None if base is None else found.rewards(base, target)
        if base is None or gain is None or other is None:
            cells.append("\u2013")
            continue
        share = gain[0] / (found.limit(target)[0] - other[0])
        cells.append(
            _at(found, gain, target, arm.name, base) + (f" ({share:.0%})" if target <= furthest else "")
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
