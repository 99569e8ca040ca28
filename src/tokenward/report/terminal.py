"""A pair in the terminal: tokens on a coloured ground, selected ones in brackets, those with a weight under 0 in braces."""

from collections.abc import Sequence

from rich.style import Style
from rich.text import Text

from tokenward.display import signed
from tokenward.report.single import Colour, ShownPair, ShownToken, by_character, colour, visible

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
