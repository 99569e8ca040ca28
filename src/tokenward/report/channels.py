"""Channels: named numbers per token that a page can show, and the scale that each is shown on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tokenward.report.collect import RunFolder
from tokenward.report.pairs import PairReader, ScoredPair, scores_of
from tokenward.report.pieces import eos_count
from tokenward.report.selections import WEIGHT, selections_of
from tokenward.scoring.reads import reads_of
from tokenward.scoring.scorers import SCORERS, Random, Scorer, Surprisal
from tokenward.scoring.store import TokenRecord
from tokenward.selection import ScoredTokens, Selector, TopFraction, scope_of, stable_noise
from tokenward.tokens.spans import ByteSpan, span_values
from tokenward.types import Span

SCHEMA = 2
"""Version of the page's data: ``channels``; per pair ``shared`` words; per response ``ids``, ``ends`` (offsets), ``breaks``
(where words and sentences begin) and values by channel."""

CLIPPED = 0.98
"""A scale ends at this quantile of the run's absolute values."""

ONE_SIDED = 0.02
"""Scores of which a smaller share than this is on one side of 0 have no natural zero."""


class Channel(NamedTuple):
    """One number per token, for all pairs.

    Attributes:
        name: Short name, unique on a page.
        kind: ``score``, which can be shaded and selected by; ``value`` and ``weight``, shown on the card;
            ``known``, values of the data's own spans; ``noise``, what random choices are made by.
        zero: The value that is shown without colour.
        limit: Distance from zero at which the colour is strongest.
        centred: Whether zero is the run's median and not 0.
    """

    name: str
    kind: str
    zero: float = 0.0
    limit: float = 1.0
    centred: bool = False


def scale_of(values: np.ndarray) -> tuple[float, float, bool]:
    """Zero, limit and whether zero is the median, for the scores of a whole run.  [n]

    Zero stays 0 where scores have both signs. A reward or a probability has one sign: its median is the middle.
    """
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0, False
    centred = min(float(np.mean(values < 0)), float(np.mean(values > 0))) < ONE_SIDED and bool(np.any(values))
    zero = float(np.median(values)) if centred else 0.0
    limit = float(np.quantile(np.abs(values - zero), CLIPPED))
    return zero, limit or 1.0, centred


class OtherRun(NamedTuple):
    """A second run whose scores stand beside the first's."""

    name: str
    reader: PairReader

    def values(self, record: TokenRecord) -> np.ndarray:
        """Its scores of the same response; NaN where it has none, or other tokens.  -> [n]"""
        if record.key in self.reader.store:
            mine = self.reader.store[record.key]
            if mine.ids == record.ids:
                return scores_of(self.reader.scorer, mine)
        return np.full(len(record.ids), np.nan, np.float32)


class Channels:
    """The channels of a run, and their values of any of its pairs.

    Args:
        reader: The run's pairs.
        values: ``[n]``, all scores of the run by its own scorer.
        sample: Pairs that the scales of the other scorers are made from.
        others: Further runs whose scores are shown too.
        given: Spans by the key of their response, in place of the data's own.
    """

    def __init__(
        self,
        reader: PairReader,
        values: np.ndarray,
        sample: Sequence[ScoredPair],
        others: Sequence[OtherRun] = (),
        given: Mapping[str, Sequence[Span]] | None = None,
    ) -> None:
        self._others, self._given = others, given
        self._stored = list(sample[0].records[0].values)
        self._scorers = _scorers(reader, self._stored)
        self._known = given is not None or any(pair.comparison.spans is not None for pair in sample)
        self.selections = selections_of(reader.run)
        self._weighed = [found for found in self.selections if found.when == "pair"]
        self._selector = self.selections[0].selector if self.selections else TopFraction()
        self._scorer = reader.scorer
        scales = {name: scale_of(_all(sample, name, self._scores)) for name in self.scores}
        scales[reader.scorer_name] = scale_of(values)
        self.channels = [
            *(Channel(name, "score", *scales[name]) for name in self.scores),
            *(Channel(name, "value") for name in self._stored),
            *(Channel(found.channel, WEIGHT) for found in self._weighed),
            *([Channel("known", "known")] if self._known else []),
            *(Channel(name, "noise") for name in self._noises),
        ]

    @property
    def scores(self) -> list[str]:
        """Names of the channels that can be shaded, the run's own scorer first."""
        return [*self._scorers, *(other.name for other in self._others)]

    @property
    def _noises(self) -> dict[str, int]:
        """What random directions and random ties are drawn by, and their seeds."""
        if not isinstance(self._selector, TopFraction):
            return {}
        return {"noise": self._selector.seed, "noise of ties": self._selector.seed + 1}

    def selection(self) -> dict[str, Any]:
        """How the policy's tokens were selected, for the page's sliders; ``silent`` where nothing stored shows it."""
        own = self.selections[0] if self.selections else None
        return {
            "name": own.rule if own else None,
            "silent": own is not None and own.nearest is None,
            **selection_settings(self._selector),
        }

    def of(self, pair: ScoredPair) -> list[dict[str, np.ndarray]]:
        """Values of both responses of a pair, ``[n]`` float32 each, by channel."""
        tokens = scored_tokens(pair, [scores_of(self._scorer, record) for record in pair.records])
        sizes = [len(record.ids) for record in pair.records]
        ids = torch.tensor([token for record in pair.records for token in record.ids])
        shared = {found.channel: found.weights(tokens, ids) for found in self._weighed}
        # Float32 would make other ties than the selector's own draws have; a draw's rank makes the same.
        shared |= {name: _places(stable_noise(tokens, seed)) for name, seed in self._noises.items()}
        parts = {name: torch.as_tensor(value).float().split(sizes) for name, value in shared.items()}
        found = []
        for side, record in enumerate(pair.records):
            values = self.scores_of(record)
            values |= {name: np.asarray(record.values[name], np.float32) for name in self._stored}
            values |= {name: part[side].numpy() for name, part in parts.items()}
            if self._known:
                values["known"] = known_values(pair, side, self._given)
            found.append(values)
        return found

    def scores_of(self, record: TokenRecord) -> dict[str, np.ndarray]:
        """Every score of one response, ``[n]`` float32 each, by channel."""
        return {name: self._scores(name, record) for name in self.scores}

    def _scores(self, name: str, record: TokenRecord) -> np.ndarray:
        if name in self._scorers:
            return scores_of(self._scorers[name], record)
        return next(other for other in self._others if other.name == name).values(record)


def _scorers(reader: PairReader, stored: Sequence[str]) -> dict[str, Scorer]:
    """The run's scorer, and the built-in ones that what is stored allows."""
    scorers: dict[str, Scorer] = {reader.scorer_name: reader.scorer}
    for name in ("log_ratio", "reward"):
        if set(reads_of(SCORERS[name]())) <= set(stored):
            scorers.setdefault(name, SCORERS[name]())
    if "reference_logp" in stored:
        scorers.setdefault("surprisal", Surprisal())
    scorers.setdefault("random", Random())
    return scorers


def _all(sample: Sequence[ScoredPair], name: str, scores: Any) -> np.ndarray:
    return np.concatenate([scores(name, record) for pair in sample for record in pair.records])


def _places(noise: torch.Tensor) -> torch.Tensor:
    """The place of each draw among all of them: the same order in a number that float32 holds."""
    return torch.argsort(torch.argsort(noise, stable=True), stable=True)


def scored_tokens(pair: ScoredPair, scores: Sequence[np.ndarray]) -> ScoredTokens:
    """The scores of one pair as a selector takes them."""
    sizes = torch.tensor([len(side) for side in scores])
    eos = [
        torch.arange(len(record.ids)) >= len(record.ids) - eos_count(text, record)
        for text, record in zip(pair.comparison.responses, pair.records, strict=True)
    ]
    return ScoredTokens(
        scores=torch.from_numpy(np.concatenate(scores)),
        response=torch.repeat_interleave(torch.arange(2), sizes),
        comparison=torch.tensor([0, 0]),
        rank=torch.tensor([0, 1]),
        eos=torch.cat(eos),
        seeds=torch.tensor([int(record.key, 16) >> 1 for record in pair.records]),
    )


def known_values(
    pair: ScoredPair, side: int, given: Mapping[str, Sequence[Span]] | None = None
) -> np.ndarray:
    """Values of the known spans per token of one side; 0 where there is none.  -> [n] float32

    Args:
        pair: The pair.
        side: 0 or 1.
        given: Spans by the key of their response, in place of the data's own.
    """
    record, text = pair.records[side], pair.comparison.responses[side]
    own = pair.comparison.spans[side] if pair.comparison.spans is not None else ()
    spans = own if given is None else given.get(record.key, ())
    tokens = [ByteSpan(*span) for span in zip(record.start, record.end, strict=True)]
    return np.asarray(span_values(spans, text, tokens), np.float32)


def selection_settings(selector: Selector) -> dict[str, Any]:
    """What the page's sliders need of a selector; of another than ``top_fraction``, its usual rates."""
    known = selector if isinstance(selector, TopFraction) else TopFraction()
    rules = {"count": known.count, "minimum": known.minimum, "first_token": known.first_token}
    if known.profile == "official":
        rules = {"count": "float", "minimum": 0, "first_token": False}
    return {
        **rules,
        "eos": known.eos,
        "ties": known.ties,
        "scope": scope_of(selector),
        "chosen": {"fraction": known.chosen.fraction, "direction": known.chosen.direction or "top"},
        "rejected": {"fraction": known.rejected.fraction, "direction": known.rejected.direction or "bottom"},
    }


def other_runs(folders: Sequence[Path]) -> list[OtherRun]:
    """Further runs, named by their scorer and their folder; those without scores are left out."""
    readers = [PairReader.open(RunFolder.read(folder)) for folder in folders]
    return [
        OtherRun(f"{reader.scorer_name} of {reader.run.path.resolve().name}", reader)
        for reader in readers
        if reader is not None
    ]
