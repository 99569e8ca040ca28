"""One pair of a run outside a browser: its tokens with scores, shades and weights, and as styled text for a terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.style import Style
from rich.text import Text
from torch import Tensor

from tokenward.display import signed
from tokenward.errors import UserError
from tokenward.report.channels import scale_of, scored_tokens
from tokenward.report.collect import RunFolder
from tokenward.report.pairs import READ, PairReader, ScoredPair, is_unpaired, scores_of
from tokenward.report.pieces import context_before, eos_count, pieces
from tokenward.report.selections import RunSelection, scorer_note, selection_named, selections_of
from tokenward.selection import TopFraction
from tokenward.selection.weights import weights_of


class ShownToken(NamedTuple):
    """A token for display, with its shade (-1 to 1 on the run's scale, and beyond where it is clipped).

    The text of an eos token is its name. Context is text between tokens that is read but not scored.
    """

    text: str
    score: float
    shade: float
    weight: float
    eos: bool
    context: bool = False

    @property
    def kept(self) -> bool:
        """Whether it is selected."""
        return self.weight != 0


class ShownPair(NamedTuple):
    """A pair with the scale of its run: the score without colour, and its distance to the strongest colour.

    ``number`` counts the ``total`` pairs of the run from 1. ``rule`` says how the marked tokens were selected; it is empty
    if no selection can be shown. ``notes`` are further sentences about the selection.
    """

    pair: ScoredPair
    scorer: str
    sides: tuple[list[ShownToken], list[ShownToken]]
    zero: float
    limit: float
    number: int
    total: int
    rule: str
    notes: tuple[str, ...] = ()


def shown_pair(folder: str | Path, number: int, term: str | None = None) -> ShownPair:
    """A pair of a finished run, by its number in the report, with the selection of a term or the policy's own.

    Raises:
        UserError: the run has no scores, no pair of this number, or no such term.
    """
    run = RunFolder.read(folder)
    reader = PairReader.open(run)
    if reader is None:
        raise UserError(_why_no_pairs(run), code="no-pairs")
    places, values = {}, []
    for place, scores in reader.places():
        places[place.number] = place
        values += scores
    if number not in places:
        raise UserError(
            f"--row {number}: the run has {reader.total} pairs. Choose a number from 1 to {reader.total}; the report shows "
            "the number of each pair.",
            code="out-of-range",
        )
    zero, limit, _ = scale_of(np.concatenate(values))
    pair = reader.pair(places[number])
    selections = selections_of(run)
    terms = [found.term for found in selections[1:]]
    weights, rule, notes = _weights(reader, pair, selection_named(selections, term), terms)
    names, parts = run.special_names(), weights.split([len(record.ids) for record in pair.records])
    first, second = (
        _tokens(pair, side, scores_of(reader.scorer, pair.records[side]), parts[side], names, zero, limit)
        for side in (0, 1)
    )
    return ShownPair(
        pair, reader.scorer_name, (first, second), zero, limit, number, reader.total, rule, notes
    )


def _why_no_pairs(run: RunFolder) -> str:
    if is_unpaired(run):
        return (
            f"{run.path} has no pairs: each of its rows has a single response. Its figures are in the report."
        )
    missing = [f"no finished stage {name}" for name in sorted(READ - set(run.manifests))]
    return (
        f"{run.path} has {' and '.join(missing)}, so no pair can be shown. Its finished stages: {', '.join(run.manifests) or 'none'}. "
        "`tokenward score RECIPE` makes what is missing; a stage that other settings have replaced comes back with the old ones."
    )


def _weights(
    reader: PairReader, pair: ScoredPair, selection: RunSelection | None, terms: Sequence[str]
) -> tuple[Tensor, str, tuple[str, ...]]:
    """Weights of a pair's tokens, as in training or as close as possible; the rule in words; notes."""
    tokens = scored_tokens(pair, [scores_of(reader.scorer, record) for record in pair.records])
    if selection is None:
        return (
            weights_of(TopFraction(), tokens),
            "top_fraction with default rates: the run has no policy yet",
            (),
        )
    notes = tuple(
        f"the term {name} of the objective has its own selection: --term {name}"
        for name in terms
        if name != selection.term
    )
    if selection.whole:
        return torch.zeros_like(tokens.scores), "", (selection.whole, *notes)
    if selection.when == "pair":
        ids = torch.tensor([token for record in pair.records for token in record.ids])
        whose = f" for the term {selection.term}" if selection.term else ""
        return selection.weights(tokens, ids), f"the recipe's {selection.rule}{whose}", notes
    notes = tuple(filter(None, (selection.note, scorer_note(reader.run, reader.scorer_name)))) + notes
    if selection.nearest is None:
        return torch.zeros_like(tokens.scores), "", notes
    return (
        weights_of(selection.nearest, tokens),
        f"the recipe's {selection.rule}, applied within each response",
        notes,
    )


def _tokens(
    pair: ScoredPair,
    side: int,
    scores: np.ndarray,
    weights: Tensor,
    names: dict[int, str],
    zero: float,
    limit: float,
) -> list[ShownToken]:
    text, record = pair.comparison.responses[side], pair.records[side]
    first_eos = len(record.ids) - eos_count(text, record)
    shades = ((scores - zero) / limit).tolist()
    values = zip(pieces(text, record, names), scores.tolist(), shades, weights.tolist(), strict=True)
    tokens: list[ShownToken] = []
    for place, (before, value) in enumerate(zip(context_before(text, record), values, strict=True)):
        if before:
            tokens.append(ShownToken(before, float("nan"), 0.0, 0.0, False, context=True))
        tokens.append(ShownToken(*value, eos=place >= first_eos))
    return tokens


def by_character(tokens: Sequence[ShownToken]) -> list[ShownToken]:
    """Merge tokens that share a character: their mean score, and the weight with the largest absolute value."""
    groups: list[list[ShownToken]] = []
    for token in tokens:
        if groups and not token.text and not token.eos and not groups[-1][0].context:
            groups[-1].append(token)
        else:
            groups.append([token])
    return [
        group[0]._replace(
            score=sum(token.score for token in group) / len(group),
            shade=sum(token.shade for token in group) / len(group),
            weight=max((token.weight for token in group), key=abs),
        )
        for group in groups
    ]


Colour = tuple[int, int, int]

UP, DOWN = (63, 143, 214), (240, 138, 36)
"""Strongest blue and orange, as on the page."""

DARK: Colour = (12, 12, 12)
LIGHT: Colour = (255, 255, 255)

VISIBLE = 0.05
"""A weaker shade has no background, so that the terminal's own background stays."""


def colour(shade: float, page: Colour) -> Colour:
    """Colour of a shade, on a page whose colour stands for 0 and for NaN."""
    strong = UP if shade > 0 else DOWN
    share = min(abs(shade), 1.0) if shade == shade else 0.0
    red, green, blue = (
        round(share * high + (1 - share) * low) for high, low in zip(strong, page, strict=True)
    )
    return red, green, blue


def visible(text: str) -> str:
    """Text with marked line breaks and tabs, and with names for other control and format characters."""
    marks = {"\n": "↵\n", "\t": "⇥\t"}
    # Zero-width joiners hold emoji and some scripts together: what they join shows them.
    return "".join(
        marks.get(char, char if char.isprintable() or char in " \u200c\u200d" else f"‹U+{ord(char):04X}›")
        for char in text
    )


def pair_text(shown: ShownPair, *, light: bool = False) -> Text:
    """A pair as styled text, for a dark or a light background."""
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
        text.append_text(_styled_tokens(side, page))
    return text


def _legend(shown: ShownPair, page: Colour) -> Text:
    text = Text(f"{signed(shown.zero - shown.limit, shown.limit)} ")
    for step in range(-10, 11):
        text.append(" ", style=_style(step / 10, page))
    text.append(
        f" {signed(shown.zero + shown.limit, shown.limit)}  orange lowers the response, blue raises it"
    )
    if shown.rule:
        text.append(f"; [in brackets] selected by {shown.rule}")
    if any(token.weight < 0 for side in shown.sides for token in side):
        text.append(", {in braces} with a negative weight")
    return text.append("\n")


def _styled_tokens(tokens: Sequence[ShownToken], page: Colour) -> Text:
    text = Text()
    for token in by_character(tokens):
        piece = f" {token.text}" if token.eos else visible(token.text)
        if token.context:
            text.append(piece, style="dim italic")
            continue
        style = _style(token.shade, page)
        before, after = ("{}" if token.weight < 0 else "[]") if token.kept else ("", "")
        text.append(before, style="bold")
        text.append(piece, style=style + Style(italic=True) if token.eos else style)
        text.append(after, style="bold")
    return text


def _style(shade: float, page: Colour) -> Style:
    if not abs(shade) >= VISIBLE:
        return Style()
    red, green, blue = colour(shade, page)
    bright = 0.299 * red + 0.587 * green + 0.114 * blue
    return Style(bgcolor=f"rgb({red},{green},{blue})", color="black" if bright > 110 else "white")
