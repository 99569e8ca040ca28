"""One pair drawn in the terminal, or as a picture."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.cells import cell_len
from rich.style import Style
from rich.text import Text

from tokenward.display import rounded, signed
from tokenward.errors import UserError
from tokenward.report.single import Colour, ShownPair, ShownToken, by_character, colour, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


DARK: Colour = (12, 12, 12)
LIGHT: Colour = (255, 255, 255)
SEEN = 0.05
"""Shades under this have no ground of their own, so that the terminal's own stays where nothing is said."""


def pair_text(shown: ShownPair, *, light: bool = False) -> Text:
    """A pair as styled text.

    Args:
        shown: The pair.
        light: For a terminal with a light ground.
    """
    page = LIGHT if light else DARK
    totals = [sum(token.score for token in side if token.score == token.score) for side in shown.sides]
    text = Text()
    text.append(f"pair {shown.number} of {shown.total}", style="bold")
    text.append(f"  {shown.pair.comparison.source}, {shown.pair.part}\n", style="dim")
    text.append(
        f"{shown.scorer}: chosen {signed(totals[0], shown.limit)}, rejected {signed(totals[1], shown.limit)}, "
        f"margin {signed(totals[0] - totals[1], shown.limit)}\n"
    )
    text.append_text(_legend(shown, page))
    for note in shown.notes:
        text.append(f"{note}\n", style="dim")
    for message in shown.pair.comparison.prompt:
        text.append(f"\n{message['role']}: ", style="bold")
        text.append(visible(message["content"]), style="dim")
    for name, side in zip(("chosen", "rejected"), shown.sides, strict=True):
        text.append(f"\n\n{name}: ", style="bold")
        text.append_text(_tokens(side, page))
    return text


def _legend(shown: ShownPair, page: Colour) -> Text:
    text = Text(f"{signed(shown.zero - shown.limit, shown.limit)} ")
    for step in range(-10, 11):
        text.append(" ", style=_style(step / 10, page))
    text.append(f" {signed(shown.zero + shown.limit, shown.limit)}  orange lowers, blue raises")
    if shown.rule:
        text.append(f"; [in brackets] kept by {shown.rule}")
    if any(token.weight < 0 for side in shown.sides for token in side):
        text.append(", {in braces} with a weight under 0")
    return text.append("\n")


def _tokens(tokens: Sequence[ShownToken], page: Colour) -> Text:
    text = Text()
    for token in by_character(tokens):
        piece = f" {token.text}" if token.eos else visible(token.text)
        if token.context:
            text.append(piece, style="dim italic")
            continue
        style = _style(token.shade, page)
        opening, eos = "{}" if token.weight < 0 else "[]"
        if token.kept:
            text.append(opening, style="bold")
        text.append(piece, style=style + Style(italic=True) if token.eos else style)
        if token.kept:
            text.append(eos, style="bold")
    return text


def _style(shade: float, page: Colour) -> Style:
    if not abs(shade) >= SEEN:
        return Style()
    red, green, blue = colour(shade, page)
    bright = 0.299 * red + 0.587 * green + 0.114 * blue
    return Style(bgcolor=f"rgb({red},{green},{blue})", color="black" if bright > 110 else "white")


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
