"""Channels: named numbers per token that a page can show, and the scale of each."""

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
(starts of words and sentences) and values by channel."""

CLIPPED = 0.98
"""A scale ends at this quantile of the run's absolute values."""

ONE_SIDED = 0.02
"""If a smaller share of the scores is on one side of 0, the scores have no natural zero."""


class Channel(NamedTuple):
    """One number per token.

    Attributes:
        name: Short name, unique on a page.
        kind: ``score`` (can be shaded and selected by), ``value`` and ``weight`` (shown on the card), ``known`` (values of
            the data's spans), or ``noise`` (random numbers of a selection).
        zero: The value without colour.
        limit: Distance from zero with the strongest colour.
        centred: Whether zero is the run's median instead of 0.
    """

    name: str
    kind: str
    zero: float = 0.0
    limit: float = 1.0
    centred: bool = False


def scale_of(values: np.ndarray) -> tuple[float, float, bool]:
    """Zero, limit and whether zero is the median, for all scores of a run.  [n]

    Zero is 0 if the scores have both signs. A reward or a probability has one sign, so its zero is the median.
    """
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0, False
    centred = min(float(np.mean(values < 0)), float(np.mean(values > 0))) < ONE_SIDED and bool(np.any(values))
    zero = float(np.median(values)) if centred else 0.0
    limit = float(np.quantile(np.abs(values - zero), CLIPPED))
    return zero, limit or 1.0, centred


class OtherRun(NamedTuple):
    """Another run whose scores are shown as a further channel."""

    name: str
    reader: PairReader

    def values(self, record: TokenRecord) -> np.ndarray:
        """Its scores of the same response; NaN if it has none, or has other tokens.  -> [n]"""
        if record.key in self.reader.store:
            mine = self.reader.store[record.key]
            if mine.ids == record.ids:
                return scores_of(self.reader.scorer, mine)
        return np.full(len(record.ids), np.nan, np.float32)


def other_runs(folders: Sequence[Path]) -> list[OtherRun]:
    """Other runs, named by their scorer and their folder; runs without scores are left out."""
    readers = [PairReader.open(RunFolder.read(folder)) for folder in folders]
    return [
        OtherRun(f"{reader.scorer_name} of {reader.run.path.resolve().name}", reader)
        for reader in readers
        if reader is not None
    ]


class Channels:
    """The channels of a run, and their values for each of its pairs.

    Args:
        reader: Reads the run's pairs.
        values: ``[n]``, all scores of the run by its own scorer.
        sample: Pairs for the scales of the other scorers.
        others: Other runs whose scores are shown too.
        given: Spans by response key, instead of the data's own.
    """

    def __init__(
        self,
        reader: PairReader,
        values: np.ndarray,
        sample: Sequence[ScoredPair],
        others: Sequence[OtherRun] = (),
        given: Mapping[str, Sequence[Span]] | None = None,
    ) -> None:
        self._others, self._given, self._scorer = others, given, reader.scorer
        self._stored = list(sample[0].records[0].values)
        self._scorers = _scorers(reader, self._stored)
        self._known = given is not None or any(pair.comparison.spans is not None for pair in sample)
        self.selections = selections_of(reader.run)
        self._weighed = [found for found in self.selections if found.when == "pair"]
        self._selector = self.selections[0].selector if self.selections else TopFraction()
        seed = self._selector.seed if isinstance(self._selector, TopFraction) else None
        # The random numbers of random directions and of random ties.
        self._noises = {} if seed is None else {"noise": seed, "noise of ties": seed + 1}
        self.channels = [
            Channel(reader.scorer_name, "score", *scale_of(values)),
            *self._other_scores([record for pair in sample for record in pair.records]),
            *(Channel(name, "value") for name in self._stored),
            *(Channel(found.channel, WEIGHT) for found in self._weighed),
            *([Channel("known", "known")] if self._known else []),
            *(Channel(name, "noise") for name in self._noises),
        ]

    def _other_scores(self, sample: Sequence[TokenRecord]) -> list[Channel]:
        """The scores besides the run's own, scaled by a sample of responses."""
        columns: dict[str, list[np.ndarray]] = {}
        for record in sample:
            for name, values in list(self.scores_of(record).items())[1:]:
                columns.setdefault(name, []).append(values)
        return [Channel(name, "score", *scale_of(np.concatenate(column))) for name, column in columns.items()]

    def selection(self) -> dict[str, Any]:
        """The policy's selection for the page's sliders; ``silent`` if stored values do not show it."""
        own = self.selections[0] if self.selections else None
        return {
            "name": own.rule if own else None,
            "silent": own is not None and own.nearest is None,
            "whole": own.whole if own else "",
            **selection_settings(self._selector),
        }

    def of(self, pair: ScoredPair) -> list[dict[str, np.ndarray]]:
        """Values of both responses of a pair by channel, ``[n]`` float32 each."""
        tokens = scored_tokens(pair, [scores_of(self._scorer, record) for record in pair.records])
        sizes = [len(record.ids) for record in pair.records]
        ids = torch.tensor([token for record in pair.records for token in record.ids])
        shared = {found.channel: found.weights(tokens, ids) for found in self._weighed}
        # Rounding the random numbers to float32 would create ties. Their ranks keep the order exactly.
        shared |= {name: _ranks(stable_noise(tokens, seed)) for name, seed in self._noises.items()}
        parts = {name: torch.as_tensor(value).float().split(sizes) for name, value in shared.items()}
        found = []
        for side, record in enumerate(pair.records):
            values = self.scores_of(record)
            values |= {name: np.asarray(record.values[name], np.float32) for name in self._stored}
            values |= {name: part[side].numpy() for name, part in parts.items()}
            if self._known:
                values["known"] = self._known_values(pair, side)
            found.append(values)
        return found

    def scores_of(self, record: TokenRecord) -> dict[str, np.ndarray]:
        """All scores of one response by channel, ``[n]`` float32 each; the run's own scorer is first."""
        own = {name: scores_of(scorer, record) for name, scorer in self._scorers.items()}
        return own | {other.name: other.values(record) for other in self._others}

    def _known_values(self, pair: ScoredPair, side: int) -> np.ndarray:
        record, text = pair.records[side], pair.comparison.responses[side]
        own = pair.comparison.spans[side] if pair.comparison.spans is not None else ()
        spans = own if self._given is None else self._given.get(record.key, ())
        tokens = [ByteSpan(*span) for span in zip(record.start, record.end, strict=True)]
        return np.asarray(span_values(spans, text, tokens), np.float32)


def _scorers(reader: PairReader, stored: Sequence[str]) -> dict[str, Scorer]:
    """The run's scorer, and the built-in ones that can be computed from the stored values."""
    scorers: dict[str, Scorer] = {reader.scorer_name: reader.scorer}
    for name in ("log_ratio", "reward"):
        if set(reads_of(SCORERS[name]())) <= set(stored):
            scorers.setdefault(name, SCORERS[name]())
    if "reference_logp" in stored:
        scorers.setdefault("surprisal", Surprisal())
    scorers.setdefault("random", Random())
    return scorers


def _ranks(noise: torch.Tensor) -> torch.Tensor:
    return torch.argsort(torch.argsort(noise, stable=True), stable=True)


def scored_tokens(pair: ScoredPair, scores: Sequence[np.ndarray]) -> ScoredTokens:
    """The scores of one pair in the form that a selector takes."""
    sizes = torch.tensor([len(side) for side in scores])
    joint = [record.segment for record in pair.records]
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
        joint=None if not all(joint) else torch.tensor([number for part in joint for number in part or ()]),
    )


def selection_settings(selector: Selector) -> dict[str, Any]:
    """The settings of ``top_fraction`` for the page's sliders; its defaults for any other selector."""
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
