"""Pictures made with matplotlib: a pair with shaded tokens, and the training curves of a run."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.cells import cell_len

from tokenward.display import rounded, signed
from tokenward.errors import UserError
from tokenward.report.charts import Points
from tokenward.report.collect import RunFolder
from tokenward.report.show import DOWN, LIGHT, UP, ShownPair, ShownToken, by_character, colour, visible
from tokenward.report.summary import curves, reach

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 88
"""Characters per line of a pair."""

ROW_INCHES, COLUMN_INCHES = 0.27, 0.0775
PANELS = 3
"""Charts side by side."""

PANEL_INCHES = (4.2, 2.9)


class _Placed(NamedTuple):
    """A token, or a part of one, on a grid of columns and rows."""

    text: str
    column: int
    row: int
    width: int
    token: ShownToken


def save_picture(shown: ShownPair, path: Path) -> None:
    """Draw a pair to a file; its extension is the format (.png, .svg, .pdf).

    Raises:
        UserError: matplotlib is not installed, or cannot write this format.
    """
    make_figure = _figure_class()
    lines = list(_lines(shown))
    rows = max(item.row for _, placed in lines for item in placed) + 1
    figure = make_figure(figsize=(WIDTH * COLUMN_INCHES + 0.3, rows * ROW_INCHES + 0.3))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-1, WIDTH + 2), ylim=(rows + 0.5, -0.5))
    axes.axis("off")
    for heading, placed in lines:
        row = placed[0].row - 0.5
        axes.text(0, row, heading, va="center", fontsize=10, fontweight="bold", parse_math=False)
        for item in placed:
            _draw(axes, item)
    _save(figure, path)


def save_curves(folder: str | Path, path: Path) -> int:
    """Draw the report's training curves to a file; its extension is the format (.png, .svg, .pdf).

    Returns:
        The number of charts.

    Raises:
        UserError: no stage logged two steps, matplotlib is not installed, or cannot write this format.
    """
    run = RunFolder.read(folder)
    drawn = list(curves(run))
    if not drawn:
        raise UserError(
            f"no stage of {run.path} logged two steps, so there is no curve to draw. It holds the stages "
            f"{', '.join(run.manifests)}. Train longer, or log more often: --set policy.training.logging_steps=1.",
            code="no-history",
        )
    rows, columns = -(-len(drawn) // PANELS), min(len(drawn), PANELS)
    size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + 0.4)
    figure = _figure_class()(figsize=size, layout="constrained")
    figure.suptitle(run.path.resolve().name, parse_math=False)
    for number, (title, series) in enumerate(drawn, start=1):
        _panel(figure.add_subplot(rows, columns, number), title, series)
    _save(figure, path)
    return len(drawn)


def _panel(axes: "Axes", title: str, series: dict[str, Points]) -> None:
    colours = [tuple(part / 255 for part in strong) for strong in (UP, DOWN)]
    for number, (name, points) in enumerate(series.items()):
        steps, values = zip(*points, strict=True) if points else ((), ())
        axes.plot(
            steps,
            values,
            color=colours[number % len(colours)],
            linestyle="-" if number == 0 else "--",  # for readers who do not see the colours
            marker="." if len(points) < 30 else "",
            label=name,
        )
    first_step = min(step for points in series.values() for step, _ in points)
    axes.update_datalim([(first_step, end) for end in reach(title, series)])
    axes.autoscale_view()
    axes.set_title(title, fontsize=9, parse_math=False)
    axes.set_xlabel("update", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend(fontsize=8, frameon=False)


def _figure_class() -> "type[Figure]":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "a picture needs matplotlib, which is not installed. Install it: pip install 'tokenward[plots]'.",
            code="missing-package",
        ) from error
    return Figure


def _save(figure: "Figure", path: Path) -> None:
    with warnings.catch_warnings():
        # A character that the font lacks is drawn as a box, so the warning says nothing new.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        try:
            figure.savefig(path, dpi=150)
        except (ValueError, OSError) as error:
            raise UserError(f"the picture {path} cannot be written: {error}", code="cannot-write") from error


def _lines(shown: ShownPair) -> Iterator[tuple[str, list[_Placed]]]:
    row = 1
    ends = f"±{rounded(shown.limit, shown.limit, 2)} around {rounded(shown.zero, shown.limit, 2)}"
    marked = "framed tokens are selected" if shown.rule else "no token is marked"
    for name, tokens in zip(("chosen", "rejected"), shown.sides, strict=True):
        total = sum(token.score for token in tokens if token.score == token.score)
        placed = list(_lay_out(tokens, row))
        yield (
            f"{name}: {signed(total, shown.limit)}   ({shown.scorer}, colours to {ends}; {marked})",
            placed,
        )
        row = placed[-1].row + 3


def _lay_out(tokens: Sequence[ShownToken], row: int) -> Iterator[_Placed]:
    """Tokens from left to right, with a new line at each line break and when a line is full."""
    column = 0
    for token in by_character(tokens):
        for part in visible(token.text).splitlines(keepends=True) or [""]:
            text = part.rstrip("\n")
            width = cell_len(text)
            if column and column + width > WIDTH:
                row, column = row + 1, 0
            yield _Placed(text, column, row, width, token)
            column += width
            if part.endswith("\n"):
                row, column = row + 1, 0


def _draw(axes: "Axes", item: _Placed) -> None:
    from matplotlib.patches import Rectangle

    token = item.token
    axes.add_patch(
        Rectangle(
            (item.column, item.row + 0.08),
            item.width,
            0.84,
            facecolor=tuple(part / 255 for part in colour(token.shade, LIGHT)),
            edgecolor="black" if token.kept else "none",
            linestyle="dotted" if token.weight < 0 else "solid",
            linewidth=1.2,
            zorder=2 if token.kept else 1,  # otherwise the next token would hide a part of the frame
        )
    )
    axes.text(
        item.column,
        item.row + 0.5,
        item.text,
        va="center",
        family="monospace",
        fontsize=9.2,
        parse_math=False,
        zorder=3,
        style="italic" if token.eos or token.context else "normal",
        color="grey" if token.context else "black",
    )
