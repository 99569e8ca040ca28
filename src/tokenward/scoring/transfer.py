"""Values of one tokenizer's tokens as values of another's, for the same responses.

A response is spelled from the ids of both. Special tokens, such as the end of a turn, spell nothing: they stand between the
stretches of text and correspond to each other. White space at the ends of a stretch may differ, because templates strip it and
some tokenizers add a space. Anything else that differs is refused. :mod:`tokenward.ops.alignment` divides the values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenward.errors import UserError
from tokenward.ops.alignment import Covered, carried, overlaps, segments
from tokenward.plugins import name_of
from tokenward.scoring.reads import is_online, reads_of
from tokenward.scoring.scorers import Combine, Scorer
from tokenward.scoring.steps import Affine
from tokenward.scoring.store import SEGMENT, Found, TokenRecord, TokenStore
from tokenward.tokens.rows import TokenRow, keys_of
from tokenward.tokens.spans import byte_pieces
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Template

CHECKED = 2000
"""Number of responses whose texts are compared before anything is computed. All are compared when values are carried."""

_SHOWN = 20
_APART = 2  # bytes between stretches, so that no token of one touches the next

ADDITIVE = ("", "logp")
"""Kinds of values of which a longer text has the sum of its parts: a reward and a log-probability."""


class LaidToken(NamedTuple):
    """A token over the stretches of text of its response.

    Attributes:
        stretch: Number of its stretch; for a special token, of the one before it.
        start: First byte in the stretch.
        end: Byte after the last one.
        special: Whether it is a special token.
    """

    stretch: int
    start: int
    end: int
    special: bool


class Laid(NamedTuple):
    """The tokens of a response, laid out over the stretches of text that they spell.

    Attributes:
        texts: The stretches of text. Between two of them, and at the end unless the response was cut, are special tokens.
        tokens: The tokens.
        cut: Whether the end is missing.
    """

    texts: list[bytes]
    tokens: list[LaidToken]
    cut: bool


class Speller:
    """Spells the responses of a template as bytes.

    Args:
        template: The template that the responses were encoded with.
    """

    def __init__(self, template: Template) -> None:
        self._tokenizer = template.tokenizer
        self._special = template.special_ids
        self._known: dict[int, bytes] = {}

    @property
    def name(self) -> str:
        """Folder or hub name of the tokenizer."""
        return str(self._tokenizer.name_or_path)

    def lay_out(self, ids: Sequence[int], eos: int) -> Laid:
        """The tokens of a response over the text that they spell. The last ``eos`` tokens end the turn."""
        new = [token for token in dict.fromkeys(ids) if token not in self._known]
        self._known.update(zip(new, byte_pieces(self._tokenizer, new), strict=True))
        # The tokens that end a turn may be ordinary ones elsewhere.
        marks = [token in self._special or place >= len(ids) - eos for place, token in enumerate(ids)]
        texts, tokens = [b""], list[LaidToken]()
        for special, group in groupby(zip(ids, marks, strict=True), itemgetter(1)):
            for token, _ in group:
                start = len(texts[-1])
                texts[-1] += b"" if special else self._known[token]
                tokens.append(LaidToken(len(texts) - 1, start, len(texts[-1]), special))
            if special:
                texts.append(b"")
        cut = not (ids and marks[-1])
        return Laid(texts if cut else texts[:-1], tokens, cut)

    def changed(self, text: str) -> str:
        """What the tokens of a text spell instead of it; empty if they spell the text."""
        ids = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        spelled = b"".join(byte_pieces(self._tokenizer, ids)).decode(errors="replace")  # type: ignore[arg-type]
        return "" if spelled.strip() == text.strip() else spelled


def _edges(text: bytes, *, cut: bool) -> tuple[int, int]:
    """Where a stretch begins and ends without the white space at its ends; the end of one that was cut off stays."""
    found = text.decode(errors="surrogateescape")
    first = len(found) - len(found.lstrip())
    last = len(found) if cut else max(len(found.rstrip()), first)
    return tuple(len(found[:place].encode(errors="surrogateescape")) for place in (first, last))  # type: ignore[return-value]


class _Collected:
    """Collects the tokens of many responses as spans, end to end."""

    def __init__(self) -> None:
        self._found: list[tuple[int, int, int]] = []
        self.counts: list[int] = []

    def add(
        self, laid: Laid, leads: Sequence[int], sizes: Sequence[int], bases: Sequence[int], part: int
    ) -> None:
        """Add a response, from where its stretches begin, how long they are, and where they are placed."""
        for stretch, start, end, special in laid.tokens:
            base, size = bases[stretch], sizes[stretch]
            if special:
                place = base + size + 1
                self._found.append((place, place, part + 2 * stretch + 1))
            else:
                within = [base + min(max(place - leads[stretch], 0), size) for place in (start, end)]
                self._found.append((within[0], within[1], part + 2 * stretch))
        self.counts.append(len(laid.tokens))

    @property
    def spans(self) -> Covered:
        """All tokens."""
        columns = np.array(self._found, np.int64).reshape(-1, 3).T.copy()
        return Covered(*map(torch.from_numpy, columns))


@dataclass(frozen=True)
class Texts:
    """The tokens of both sides of some responses, laid out over the text that both spell."""

    source: Speller
    target: Speller
    _sides: tuple[_Collected, _Collected] = field(default_factory=lambda: (_Collected(), _Collected()))
    _next: list[int] = field(default_factory=lambda: [0, 0])  # the next free byte and stretch

    def add(self, ids: Sequence[Sequence[int]], eos: Sequence[int], where: str, text: str) -> None:
        """Add a response.

        Args:
            ids: Its ids of the source, and those of the target.
            eos: The number of tokens at their end that end the turn.
            where: The row, for messages.
            text: The response in the data, for messages.

        Raises:
            UserError: They do not spell the same text.
        """
        one, other = self.source.lay_out(ids[0], eos[0]), self.target.lay_out(ids[1], eos[1])
        edges = [
            [
                _edges(text, cut=laid.cut and place == len(laid.texts) - 1)
                for place, text in enumerate(laid.texts)
            ]
            for laid in (one, other)
        ]
        self._check_same((one, other), edges, where, text)
        sizes = [[end - start for start, end in side] for side in edges]
        base, part = self._next
        bases, longest = [], max(map(len, sizes))
        room = [max(side[place] if place < len(side) else 0 for side in sizes) for place in range(longest)]
        for size in room:
            bases.append(base)
            base += size + _APART
        for side, laid, own in zip(self._sides, (one, other), edges, strict=True):
            side.add(laid, [start for start, _ in own], room, bases, part)
        self._next[:] = [base, part + 2 * longest]

    def spans(self) -> tuple[Covered, Covered]:
        """The tokens of the source and of the target, of all responses in order."""
        return self._sides[0].spans, self._sides[1].spans

    def _check_same(
        self, laid: tuple[Laid, Laid], edges: Sequence[Sequence[tuple[int, int]]], where: str, text: str
    ) -> None:
        one, other = (
            [text[slice(*edge)] for text, edge in zip(side.texts, own, strict=True)]
            for side, own in zip(laid, edges, strict=True)
        )
        cut = laid[0].cut, laid[1].cut
        fits = len(one) <= len(other) if cut[0] else len(one) == len(other)
        fits = fits or (cut[1] and len(other) <= len(one))
        for place, both in enumerate(zip(one, other, strict=False)):
            ends = any(off and place == len(side) - 1 for off, side in zip(cut, (one, other), strict=True))
            size = min(map(len, both)) if ends else max(map(len, both))
            fits = fits and both[0][:size] == both[1][:size]
        if not fits:
            raise self._differs(b" ".join(one), b" ".join(other), where, text)

    def _differs(self, one: bytes, other: bytes, where: str, text: str) -> UserError:
        for speller in (self.source, self.target):
            if spelled := speller.changed(text):
                mine, data = _excerpts(spelled.strip().encode(), text.strip().encode())
                return UserError(
                    f"{where}: the tokenizer of {speller.name} changes the text: it reads {mine!r} for {data!r}. So its tokens have no "
                    "place in the text, and scores cannot go from one tokenizer to the other. Use a model whose tokenizer keeps the text "
                    "(byte-level BPE, or byte fallback without a normalizer).",
                    code="normalized-text",
                )
        mine, theirs = _excerpts(one, other)
        return UserError(
            f"{where}: the chat templates of {self.source.name} and {self.target.name} write this response as different texts, "
            f"{mine!r} and {theirs!r}, so scores cannot go from the tokens of one to those of the other. Remove the row, or write "
            "template: plain.",
            code="texts-differ",
        )


def _excerpts(one: bytes, other: bytes) -> tuple[str, str]:
    """Both texts around the first place where they differ."""
    both = [side.decode(errors="replace") for side in (one, other)]
    place = next((at for at, (a, b) in enumerate(zip(*both, strict=False)) if a != b), min(map(len, both)))
    first = max(place - _SHOWN, 0)
    return both[0][first : place + _SHOWN], both[1][first : place + _SHOWN]


@dataclass(frozen=True)
class Carrier:
    """Computes the values of a score store from the values that another tokenizer's tokens have in another store.

    A response that is not in the other store, because it was too long there, has no values (NaN).

    Attributes:
        store: The values of the source.
        names: Their names.
        rows: The rows of the source.
        source: Spells the source's tokens.
        target: Spells the tokens of the rows.
    """

    store: TokenStore
    names: Sequence[str]
    rows: TokenTable
    source: Speller
    target: Speller

    @property
    def passes(self) -> int:
        """As :attr:`tokenward.api.values.Maker.passes`."""
        return 1

    @cached_property
    def _numbers(self) -> dict[int, int]:
        return numbers_of_responses(self.rows)

    def __call__(self, group: Sequence[TokenRow], progress: Callable[[int], None]) -> dict[str, Found]:
        """The values of some rows by name, in float64, and under :data:`SEGMENT` the segment of each token.

        Raises:
            UserError: The two sides of a response do not spell the same text.
        """
        texts, records, counts = Texts(self.source, self.target), list[TokenRecord](), list[int]()
        for row in group:
            for place, key in enumerate(keys_of(row.comparison)):
                ids, number = row.responses[place], self._numbers.get(int(key, 16))
                if number is None:
                    counts.append(-len(ids))
                    continue
                records.append(self.store[key])
                counts.append(len(ids))
                both, eos = (records[-1].ids, ids), (int(self.rows.eos[number]), row.eos[place])
                texts.add(both, eos, row.comparison.source, row.comparison.responses[place])
        source, target = texts.spans()
        found, count = overlaps(source, target), len(target.start)
        columns = {
            name: carried(
                torch.tensor([value for record in records for value in record.values[name]]).double(),
                found,
                count,
            )
            for name in self.names
        }
        columns[SEGMENT] = segments(found, target)
        progress(sum(len(row.responses) for row in group))
        return {name: _by_row(group, _with_missing(column, counts)) for name, column in columns.items()}


def _with_missing(column: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """The numbers of each response; a negative count stands for as many tokens without a value."""
    parts = iter(column.split([count for count in counts if count > 0]))
    whole = not column.is_floating_point()
    found = []
    for count in counts:
        if count > 0:
            part = next(parts)
            found.append(part - part[0] if whole else part)
        else:
            found.append(torch.arange(-count) if whole else torch.full((-count,), torch.nan).double())
    return found


def _by_row(group: Sequence[TokenRow], parts: Sequence[Tensor]) -> Found:
    rest = iter(parts)
    return [[next(rest) for _ in row.responses] for row in group]


def check_texts(
    source: TokenTable, target: TokenTable, spellers: tuple[Speller, Speller], *, most: int = CHECKED
) -> None:
    """Check that both sides of the first responses spell the same texts, before anything is computed.

    Args:
        source: The rows in the source's tokens.
        target: The rows in the target's tokens.
        spellers: Of both.
        most: Number of responses to compare.

    Raises:
        UserError: They do not.
    """
    known, texts, left = numbers_of_responses(source), Texts(*spellers), most
    for number in range(len(target)):
        if left <= 0:
            return
        row, first = target[number], int(target.starts[number])
        for place, ids in enumerate(row.responses):
            other = known.get(int(target.keys[first + place]))
            if other is not None:
                own = int(np.searchsorted(source.starts, other, side="right")) - 1
                found = source[own].responses[other - int(source.starts[own])]
                eos = int(source.eos[other]), row.eos[place]
                texts.add((found, ids), eos, row.comparison.source, row.comparison.responses[place])
        left -= len(row.responses)


def numbers_of_responses(rows: TokenTable) -> dict[int, int]:
    """The number in a table of each of its responses, by key."""
    return dict(zip(rows.keys.tolist(), range(len(rows.keys)), strict=True))


def check_carried(scorer: Scorer, others: Mapping[str, str]) -> None:
    """Check that the scores of a scorer can go from the tokens of one tokenizer to those of another.

    Args:
        scorer: The scorer.
        others: The models that read other tokens than the rows have, with a fingerprint of their template each.

    Raises:
        UserError: It reads a value that is not a sum over tokens, such as an entropy; or its score is none.
    """
    read = [value for value in reads_of(scorer) if value.model in others]
    if not read:
        return
    for value in read:
        if value.kind not in ADDITIVE:
            raise _not_carried(
                scorer,
                f"reads {value}, and {value.model} has another tokenizer than the policy. Of the tokens of another tokenizer, only "
                "log-probabilities and rewards can be divided, not {value.kind}".replace(
                    "{value.kind}", value.kind
                ),
            )
    if is_online(scorer):
        raise _not_carried(scorer, "reads the policy in training beside a model with another tokenizer")
    if isinstance(scorer, Combine):
        _check_combined(scorer, others)
        return
    tokens = {others.get(value.model, "") for value in reads_of(scorer) if value.model != "data"}
    if len(tokens) > 1:
        models = " and ".join(dict.fromkeys(value.model for value in reads_of(scorer)))
        raise UserError(
            f"the scorer {name_of(scorer)} compares {models}, which have different tokenizers, so their log-probabilities belong to "
            "different tokens. Compare a model with the one that it was trained from: pass TokenScorer.load(FOLDER, reference=MODEL) as "
            "oracle, or that model as reference.",
            code="tokenizer-mismatch",
        )
    if not getattr(scorer, "additive", False):
        raise _not_carried(
            scorer,
            f"reads {read[0]} of another tokenizer than the policy's, and its score of a text is not the sum of the scores of its tokens. "
            "A class of your own whose score is such a sum says so with additive = True",
        )


def _check_combined(scorer: Combine, others: Mapping[str, str]) -> None:
    for part in scorer.members:
        if not any(value.model in others for value in reads_of(part.scorer)):
            continue
        check_carried(part.scorer, others)
        scales = all(isinstance(step, Affine) and step.shift == 0 for step in part.chain.steps)
        if scorer.how != "sum" or not scales:
            what = f"how: {scorer.how}" if scorer.how != "sum" else f"steps: {', '.join(part.chain.names)}"
            raise _not_carried(
                scorer,
                f"has {what} on scores of another tokenizer than the policy's, which are divided among its tokens. Only a sum of scaled "
                "scores keeps its meaning then; other steps belong in the selection",
            )


def _not_carried(scorer: Scorer, problem: str) -> UserError:
    return UserError(
        f"the scorer {name_of(scorer)} {problem}. Use log_ratio, log_probability, surprisal or reward, or models of one family.",
        code="cannot-transfer",
    )
