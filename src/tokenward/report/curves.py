"""The training curves of a run, all stages in one picture."""

from pathlib import Path
from typing import TYPE_CHECKING

from tokenward.errors import UserError
from tokenward.report.charts import Points
from tokenward.report.collect import RunFolder
from tokenward.report.picture import figure_class, written
from tokenward.report.single import DOWN, UP
from tokenward.report.tables import curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
PANEL_INCHES = (4.2, 2.9)
COLOURS = [tuple(part / 255 for part in colour) for colour in (UP, DOWN)]
"""As on the page."""


def save_curves(folder: str | Path, path: Path) -> int:
    """Draw what the report draws under Training into a file; its ending says the kind (.png, .svg, .pdf).

    Args:
        folder: The run's folder.
        path: The picture.

    Returns:
        How many charts are in it.

    Raises:
        UserError: no stage logged two steps, matplotlib is not installed, or it cannot write such a file.
    """
    run = RunFolder.read(folder)
    drawn = list(curves(run))
    if not drawn:
        raise UserError(
            f"no stage of {run.path} has a history of two logged steps or more, so there is no curve. It holds "
            f"{', '.join(run.manifests)}. Train longer, or log more often: --set policy.training.logging_steps=1."
        )
    rows = -(-len(drawn) // COLUMNS)
    size = (PANEL_INCHES[0] * min(len(drawn), COLUMNS), PANEL_INCHES[1] * rows + 0.4)
    figure = figure_class()(figsize=size, layout="constrained")
    figure.suptitle(run.path.resolve().name, parse_math=False)
    for number, (title, series) in enumerate(drawn, start=1):
        _panel(figure.add_subplot(rows, min(len(drawn), COLUMNS), number), title, series)
    written(figure, path)
    return len(drawn)


def _panel(axes: "Axes", title: str, series: dict[str, Points]) -> None:
    for number, (name, points) in enumerate(series.items()):
        steps, values = zip(*points, strict=True)
        axes.plot(
            steps,
            values,
            color=COLOURS[number % len(COLOURS)],
            linestyle="-" if number == 0 else "--",  # told apart without colour too
            marker="." if len(points) < 30 else "",
            label=name,
        )
    axes.set_title(title, fontsize=9, parse_math=False)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend(fontsize=8, frameon=False)
