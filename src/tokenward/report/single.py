"""One pair of a run, ready to be shown outside a browser: pieces, scores, shades and what is kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokenward.errors import UserError
from tokenward.report.channels import scale_of, scored_tokens
from tokenward.report.collect import RunFolder
from tokenward.report.pairs import PairReader, ScoredPair, scores_of, selection_of
from tokenward.report.pieces import closing_count, pieces
from tokenward.selection import TopFraction, scope_of, selector_of


class ShownToken(NamedTuple):
    """One token as it is shown.

    Attributes:
        text: Its piece of the text, or its name where it closes the turn.
        score: By the run's scorer.
        shade: -1 to 1 on the run's scale, further out where the scale is clipped.
        kept: Whether the selection keeps it.
        closing: Whether it closes the turn and is no text.
    """

    text: str
    score: float
    shade: float
    kept: bool
    closing: bool


class ShownPair(NamedTuple):
    """One pair with the scale of its run.

    Attributes:
        pair: The pair.
        scorer: Name of the run's scorer.
        sides: Tokens of the chosen and of the rejected response.
        zero: Score that has no colour.
        limit: Distance from it at which the colour is strongest.
        number: Of the pair in the run, from 1.
        total: Pairs of the run.
        rule: How the kept tokens were chosen, in words.
    """

    pair: ScoredPair
    scorer: str
    sides: tuple[list[ShownToken], list[ShownToken]]
    zero: float
    limit: float
    number: int
    total: int
    rule: str


def shown_pair(folder: str | Path, number: int) -> ShownPair:
    """A pair of a finished run.

    Args:
        folder: The run's folder.
        number: Which pair, counted from 1 over the training pairs and then the held-out ones, as the report has it.

    Raises:
        UserError: the run has no scores, or not so many pairs.
    """
    run = RunFolder.read(folder)
    reader = PairReader.open(run)
    if reader is None:
        raise UserError(
            f"{run.path} has no scores, so no pair of it can be shown. It holds {', '.join(run.manifests)}; "
            "the stage scores comes with `tokenward score RECIPE`."
        )
    places, values = [], []
    for place, scores in reader.places():
        places.append(place)
        values += scores
    if not 1 <= number <= len(places):
        raise UserError(
            f"--row {number}: the run has {len(places)} pairs. Give a number from 1 to {len(places)}; the report names "
            "the number of each pair."
        )
    zero, limit, _ = scale_of(np.concatenate(values))
    pair = reader.pair(places[number - 1])
    kept, rule = _kept(run, reader, pair)
    names = run.special_names()
    first, second = (
        _tokens(pair, side, scores_of(reader.scorer, pair.records[side]), kept[side], names, zero, limit)
        for side in (0, 1)
    )
    return ShownPair(pair, reader.scorer_name, (first, second), zero, limit, number, len(places), rule)


def _kept(run: RunFolder, reader: PairReader, pair: ScoredPair) -> tuple[Sequence[np.ndarray], str]:
    """Which tokens are kept, and by what rule: the recipe's where it depends on the pair alone."""
    table = selection_of(run)
    selector, rule = TopFraction(), "top_fraction with its usual rates"
    if table is not None:
        own = selector_of(table, run.seed)
        if scope_of(own) in ("response", "comparison"):
            selector, rule = own, f"the recipe's {table.name}"
    tokens = scored_tokens(pair, [scores_of(reader.scorer, record) for record in pair.records])
    weights = selector(tokens).split([len(record.ids) for record in pair.records])
    return [part.numpy() > 0 for part in weights], rule


def _tokens(
    pair: ScoredPair,
    side: int,
    scores: np.ndarray,
    kept: np.ndarray,
    names: dict[int, str],
    zero: float,
    limit: float,
) -> list[ShownToken]:
    text, record = pair.comparison.responses[side], pair.records[side]
    first_closing = len(record.ids) - closing_count(text, record)
    shades = ((scores - zero) / limit).tolist()
    values = zip(pieces(text, record, names), scores.tolist(), shades, kept.tolist(), strict=True)
    return [
        ShownToken(piece, score, shade, keeps, place >= first_closing)
        for place, (piece, score, shade, keeps) in enumerate(values)
    ]


def by_character(tokens: Sequence[ShownToken]) -> list[ShownToken]:
    """Tokens that share a character as one, with their mean score, kept where one of them is."""
    groups: list[list[ShownToken]] = []
    for token in tokens:
        if groups and not token.text and not token.closing:
            groups[-1].append(token)
        else:
            groups.append([token])
    return [
        group[0]._replace(
            score=sum(token.score for token in group) / len(group),
            shade=sum(token.shade for token in group) / len(group),
            kept=any(token.kept for token in group),
        )
        for group in groups
    ]


UP, DOWN = (63, 143, 214), (240, 138, 36)
"""Strongest blue and orange, as on the page."""

Colour = tuple[int, int, int]


def colour(shade: float, page: Colour) -> Colour:
    """Colour of a shade on a page of some colour, which is that of 0; one that is not a number has that too."""
    strong = UP if shade > 0 else DOWN
    share = min(abs(shade), 1.0) if shade == shade else 0.0
    red, green, blue = (
        round(share * high + (1 - share) * low) for high, low in zip(strong, page, strict=True)
    )
    return red, green, blue


def visible(text: str) -> str:
    """A piece with its line breaks and tabs marked, and other control and format characters named."""
    marks = {"\n": "↵\n", "\t": "⇥\t"}
    return "".join(
        marks.get(char, char if char.isprintable() or char == " " else _name(char)) for char in text
    )


def _name(char: str) -> str:
    # Zero-width joiners hold emoji and some scripts together, and are seen by what they join.
    return char if char in "\u200c\u200d" else f"‹U+{ord(char):04X}›"
