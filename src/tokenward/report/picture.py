"""A pair as a picture, for papers and pages."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.cells import cell_len

from tokenward.display import rounded, signed
from tokenward.errors import UserError
from tokenward.report.single import ShownPair, ShownToken, by_character, colour, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 88
WHITE = (255, 255, 255)
ROW_INCHES, COLUMN_INCHES = 0.27, 0.0775


class _Placed(NamedTuple):
    """A token, or a part of one, on a grid of columns and rows."""

    text: str
    column: int
    row: int
    width: int
    token: ShownToken


def save_picture(shown: ShownPair, path: Path) -> None:
    """Draw a pair into a file; its ending says the kind (.png, .svg, .pdf).

    Raises:
        UserError: matplotlib is not installed, or cannot write such a file.
    """
    made = figure_class()
    lines = list(_lines(shown))
    rows = max(item.row for _, placed in lines for item in placed) + 1
    figure = made(figsize=(COLUMNS * COLUMN_INCHES + 0.3, rows * ROW_INCHES + 0.3))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-1, COLUMNS + 2), ylim=(rows + 0.5, -0.5))
    axes.axis("off")
    for heading, placed in lines:
        first = placed[0].row - 1
        axes.text(0, first + 0.5, heading, va="center", fontsize=10, fontweight="bold", parse_math=False)
        for item in placed:
            _draw(axes, item)
    written(figure, path)


def figure_class() -> "type[Figure]":
    """Matplotlib's figure, which draws without a screen.

    Raises:
        UserError: it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            "a picture needs matplotlib, which is not installed. Install it: pip install 'tokenward[plots]'."
        ) from error
    return Figure


def written(figure: "Figure", path: Path) -> None:
    """Write a figure to a file, whose ending says the kind.

    Raises:
        UserError: matplotlib cannot write such a file.
    """
    with warnings.catch_warnings():
        # A character that the font lacks is drawn as a box, which says it as well.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        try:
            figure.savefig(path, dpi=150)
        except (ValueError, OSError) as error:
            raise UserError(f"the picture {path} cannot be written: {error}") from error


def _lines(shown: ShownPair) -> Iterator[tuple[str, list[_Placed]]]:
    row = 1
    for name, tokens in zip(("chosen", "rejected"), shown.sides, strict=True):
        total = sum(token.score for token in tokens if token.score == token.score)
        placed = list(_laid_out(tokens, row))
        ends = f"±{rounded(shown.limit, shown.limit, 2)} around {rounded(shown.zero, shown.limit, 2)}"
        scale = f"{shown.scorer}, colours to {ends}"
        scale += "; framed: kept" if shown.rule else "; the selection is not stored"
        yield f"{name}: {signed(total, shown.limit)}   ({scale})", placed
        row = placed[-1].row + 3


def _laid_out(tokens: Sequence[ShownToken], row: int) -> Iterator[_Placed]:
    """Tokens from left to right; a line ends at a line break or when it is full."""
    column = 0
    for token in by_character(tokens):
        for part in visible(token.text).splitlines(keepends=True) or [""]:
            text = part.rstrip("\n")
            width = cell_len(text)
            if column and column + width > COLUMNS:
                row, column = row + 1, 0
            yield _Placed(text, column, row, width, token)
            column += width
            if part.endswith("\n"):
                row, column = row + 1, 0


def _draw(axes: "Axes", item: _Placed) -> None:
    from matplotlib.patches import Rectangle

    ground = tuple(part / 255 for part in colour(item.token.shade, WHITE))
    axes.add_patch(
        Rectangle(
            (item.column, item.row + 0.08),
            item.width,
            0.84,
            facecolor=ground,
            edgecolor="black" if item.token.kept else "none",
            linestyle="dotted" if item.token.weight < 0 else "solid",
            linewidth=1.2,
            zorder=2 if item.token.kept else 1,  # or the next token's ground hides a part of the frame
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
        style="italic" if item.token.eos or item.token.context else "normal",
        color="grey" if item.token.context else "black",
    )
