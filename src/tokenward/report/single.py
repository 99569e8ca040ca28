"""One pair of a run, ready to be shown outside a browser: pieces, scores, shades and what is kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.report.channels import scale_of, scored_tokens
from tokenward.report.collect import RunFolder
from tokenward.report.pairs import PairReader, ScoredPair, only_alone, scores_of
from tokenward.report.pieces import context_before, eos_count, pieces
from tokenward.report.selections import RunSelection, scorer_note, selection_named, selections_of
from tokenward.selection import TopFraction


class ShownToken(NamedTuple):
    """One token as it is shown.

    Attributes:
        text: Its piece of the text, or its name where it closes the turn.
        score: By the run's scorer.
        shade: -1 to 1 on the run's scale, further out where the scale is clipped.
        weight: What the selection gives it; 0 where it is not kept.
        eos: Whether it closes the turn and is no text.
        context: Whether it is no token of the response: text between them that is read and has no score.
    """

    text: str
    score: float
    shade: float
    weight: float
    eos: bool
    context: bool = False

    @property
    def kept(self) -> bool:
        """Whether the selection keeps it."""
        return self.weight != 0


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
        rule: How the kept tokens were chosen, in words; empty where none can be shown.
        notes: What else there is to say of the selection, a sentence each.
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


class _Kept(NamedTuple):
    """Weights of a pair's tokens, by what rule, and what there is to say of it."""

    weights: Tensor
    rule: str
    notes: tuple[str, ...] = ()


def shown_pair(folder: str | Path, number: int, term: str | None = None) -> ShownPair:
    """A pair of a finished run.

    Args:
        folder: The run's folder.
        number: Which pair, counted from 1 over the training pairs and then the held-out ones, as the report has it.
        term: Term of the policy's objective whose own selection is shown; None shows the policy's.

    Raises:
        UserError: the run has no scores, not so many pairs, or no such term.
    """
    run = RunFolder.read(folder)
    reader = PairReader.open(run)
    if reader is None:
        raise UserError(_no_pairs(run))
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
    selections = selections_of(run)
    kept = _kept(reader, pair, selection_named(selections, term), [found.term for found in selections[1:]])
    weights = kept.weights.split([len(record.ids) for record in pair.records])
    names = run.special_names()
    first, second = (
        _tokens(
            pair,
            side,
            scores_of(reader.scorer, pair.records[side]),
            weights[side].numpy(),
            names,
            zero,
            limit,
        )
        for side in (0, 1)
    )
    sides = (first, second)
    return ShownPair(pair, reader.scorer_name, sides, zero, limit, number, len(places), kept.rule, kept.notes)


def _no_pairs(run: RunFolder) -> str:
    if only_alone(run):
        return f"{run.path} has no pair: each of its rows has one response. Its figures are in the report."
    return (
        f"{run.path} has no scores, so no pair of it can be shown. It holds {', '.join(run.manifests)}; "
        "the stage scores comes with `tokenward score RECIPE`."
    )


def _kept(
    reader: PairReader, pair: ScoredPair, selection: RunSelection | None, terms: Sequence[str]
) -> _Kept:
    """What the recipe gave weight, where that depends on the pair alone, or what comes nearest to it."""
    tokens = scored_tokens(pair, [scores_of(reader.scorer, record) for record in pair.records])
    if selection is None:
        return _Kept(TopFraction()(tokens), "top_fraction with its usual rates: the run has no policy yet")
    others = [name for name in terms if name != selection.term]
    notes = tuple(f"the objective's term {name} has a selection of its own: --term {name}" for name in others)
    if selection.when == "pair":
        ids = torch.tensor([token for record in pair.records for token in record.ids])
        whose = f" for the term {selection.term}" if selection.term else ""
        return _Kept(selection.weights(tokens, ids), f"the recipe's {selection.rule}{whose}", notes)
    notes = tuple(filter(None, (selection.note, scorer_note(reader.run, reader.scorer_name)))) + notes
    if selection.nearest is None:
        return _Kept(torch.zeros_like(tokens.scores), "", notes)
    rule = f"the recipe's {selection.rule}, its shares taken within each response"
    return _Kept(selection.nearest(tokens), rule, notes)


def _tokens(
    pair: ScoredPair,
    side: int,
    scores: np.ndarray,
    weights: np.ndarray,
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
    """Tokens that share a character as one, with their mean score, and the weight that is furthest from 0."""
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
