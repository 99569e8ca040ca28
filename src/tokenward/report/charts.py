"""Small charts as inline SVG. Colours and fonts come from the style sheet of the page."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from markupsafe import Markup

WIDTH, HEIGHT = 420, 180
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 34
LETTER = 6
"""Width of a letter. Labels that do not fit beside each other alternate between two lines."""

Points = Sequence[tuple[float, float]]


class _Frame(NamedTuple):
    """The part of the plane that a chart shows."""

    x: tuple[float, float]
    y: tuple[float, float]
    marks: list[float]

    def across(self, value: float) -> float:
        return LEFT + (value - self.x[0]) / (self.x[1] - self.x[0]) * (WIDTH - LEFT - RIGHT)

    def down(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y[0]) / (self.y[1] - self.y[0]) * (HEIGHT - TOP - BOTTOM)


def line_chart(
    title: str, series: Mapping[str, Points], *, x_label: str, y: tuple[float, float] = (0.0, 0.0)
) -> Markup:
    """Lines over a common axis; empty without points.

    Args:
        title: Caption, also for screen readers.
        series: Points by name, drawn in the style sheet's colours ``series-0``, ``series-1`` and so on.
        x_label: Label of the x axis.
        y: Values that the y axis has to reach, besides those of the points.
    """
    points = [point for line in series.values() for point in line]
    if not points:
        return Markup()
    frame = _frame(points, y)
    parts = [_axes(frame, x_label)]
    for number, line in enumerate(series.values()):
        path = " ".join(f"{frame.across(x):.1f},{frame.down(y):.1f}" for x, y in line)
        parts.append(Markup('<polyline class="series-{}" points="{}"/>').format(number, path))
    return _figure(title, parts, list(series))


def bar_chart(title: str, labels: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> Markup:
    """Groups of bars from zero; None makes no bar.

    Args:
        title: Caption.
        labels: Labels of the groups, from left to right.
        series: Values by name, one per group.
    """
    values = [value for bars in series.values() for value in bars if value is not None]
    if not values:
        return Markup()
    frame = _frame([(0.0, 0.0), (float(len(labels)), 0.0), *((0.0, value) for value in values)], (0.0, 0.0))
    width = 0.8 / len(series)
    parts = [_axes(frame, "", numbered=False)]
    for number, bars in enumerate(series.values()):
        for place, value in enumerate(bars):
            if value is not None:
                parts.append(_bar(frame, number, place + 0.1 + number * width, width, value))
    step = max(1, len(labels) // 10)
    room = step * (WIDTH - LEFT - RIGHT) / len(labels)
    lines = 2 if max(map(len, labels)) * LETTER > room else 1
    for number, (place, label) in enumerate(list(enumerate(labels))[::step]):
        below = HEIGHT - BOTTOM + 14 * (1 + number % lines)
        parts.append(_text(frame.across(place + 0.5), below, label, "middle"))
    return _figure(title, parts, list(series))


def histogram(title: str, edges: Sequence[float], series: Mapping[str, Sequence[float]]) -> Markup:
    """Shares per bin as step lines."""
    steps = {}
    for name, shares in series.items():
        corners = [
            (edge, share) for share, pair in zip(shares, pairwise(edges), strict=True) for edge in pair
        ]
        steps[name] = [(edges[0], 0.0), *corners, (edges[-1], 0.0)]
    return line_chart(title, steps, x_label="score")


def _bar(frame: _Frame, number: int, left: float, width: float, value: float) -> Markup:
    top, bottom = sorted((frame.down(value), frame.down(0.0)))
    x = frame.across(left)
    return Markup('<rect class="series-{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
        number, x, top, frame.across(left + width) - x, max(bottom - top, 0.5)
    )


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers with a round distance, the first one at or below ``low`` and the last one at or above ``high``."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    least = (high - low) / (most - 1)
    size = 10.0 ** math.floor(math.log10(least))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= least * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * number for number in range(first, last + 1)]


def _frame(points: Points, y: tuple[float, float]) -> _Frame:
    across, down = ([*values] for values in zip(*points, strict=True))
    marks = ticks(min(*down, *y), max(*down, *y))
    left, right = min(across), max(across)
    if not right > left:
        left, right = left - 0.5, right + 0.5
    return _Frame((left, right), (marks[0], marks[-1]), marks)


def _axes(frame: _Frame, x_label: str, *, numbered: bool = True) -> Markup:
    bottom = HEIGHT - BOTTOM
    parts = []
    for value in frame.marks:
        place = frame.down(value)
        kind = "axis" if value == 0 else "grid"
        parts.append(Markup('<path class="{}" d="M{},{:.1f}H{}"/>').format(kind, LEFT, place, WIDTH - RIGHT))
        parts.append(_text(LEFT - 5, place + 4, plain(value), "end"))
    if numbered:
        for value, anchor in zip(frame.x, ("start", "end"), strict=True):
            parts.append(_text(frame.across(value), bottom + 14, f"{value:.3g}", anchor))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, x_label, "middle"))
    return Markup().join(parts)


def plain(value: float) -> str:
    """A round number as people write it, with a real minus sign."""
    return f"{value:.6g}".replace("-", "−")


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _figure(title: str, parts: Sequence[Markup], names: Sequence[str]) -> Markup:
    keys = Markup().join(
        Markup('<span class="key key-{}">{}</span>').format(number, name) for number, name in enumerate(names)
    )
    picture = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, title, Markup().join(parts)
    )
    return Markup("<figure>{}<figcaption>{} {}</figcaption></figure>").format(picture, title, keys)
