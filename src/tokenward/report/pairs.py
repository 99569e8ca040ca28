"""The pairs of a finished run with their scores, and which of them a report shows."""

from collections.abc import Collection, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from tokenward.artifacts import read_manifest
from tokenward.errors import UserError
from tokenward.report.collect import RunFolder
from tokenward.report.selections import stored_scorer
from tokenward.scoring.scorers import SCORERS, Scorer
from tokenward.scoring.store import TokenRecord, TokenStore
from tokenward.tokens.segments import moved
from tokenward.tokens.store import ENCODED, EncodedStore
from tokenward.tokens.table import PAIRS, TokenTable, read_parts
from tokenward.types import Comparison


class PairPlace(NamedTuple):
    """Where a pair stands, and what its scores say of it.

    Attributes:
        part: ``train`` or ``eval``.
        row: Number of its row among the pairs of that part.
        number: Of the pair in the run, from 1: the training pairs, then the held-out ones.
        keys: Of both responses in the score store, the preferred one first.
        margin: Sum of the preferred response's scores less that of the other's.
    """

    part: str
    row: int
    number: int
    keys: tuple[str, str]
    margin: float


class ScoredPair(NamedTuple):
    """A pair with what the score store holds of it, the preferred response first.

    Attributes:
        comparison: Two responses, ranks (0, 1).
        part: ``train``, ``held out`` or ``eval_reward``.
        number: As in :class:`PairPlace`.
        records: The stored values of both.
        margin: As in :class:`PairPlace`.
    """

    comparison: Comparison
    part: str
    number: int
    records: tuple[TokenRecord, TokenRecord]
    margin: float


def scores_of(scorer: Scorer, record: TokenRecord) -> np.ndarray:
    """Scores of one stored response.  -> [n] float32"""
    return torch.as_tensor(scorer(record), dtype=torch.float32).numpy()


@dataclass(frozen=True, kw_only=True)
class PairReader:
    """Reads the pairs of a run from its data and its score store.

    Attributes:
        run: The run.
        store: Its score store.
        scorer_name: Name of the scorer, as the recipe has it.
        scorer: The run's scorer; where its scores are not stored, the usual one for what is.
    """

    run: RunFolder
    store: TokenStore
    scorer_name: str
    scorer: Scorer

    @classmethod
    def open(cls, run: RunFolder) -> "PairReader | None":
        """A reader of a run's pairs; None where the run has no scores, as an online one, or no pairs."""
        if not {"data", "reference", "scores"} <= set(run.manifests) or only_alone(run):
            return None
        store = TokenStore(run.path / "scores")
        made = stored_scorer(run)
        name, scorer = made if made is not None else (_usual_scorer(store), SCORERS[_usual_scorer(store)]())
        return cls(run=run, store=store, scorer_name=name, scorer=scorer)

    def places(self) -> Iterator[tuple[PairPlace, list[np.ndarray]]]:
        """Every pair whose responses are in the store, with the scores of both."""
        number = 0
        for part, table in self._tables.items():
            for row, size in enumerate(table.sizes.tolist()):
                if size != 2:
                    continue
                first = int(table.starts[row])
                better, worse = (f"{key:016x}" for key in table.keys[first : first + 2].tolist())
                if better in self.store and worse in self.store:
                    scores = [scores_of(self.scorer, self.store[key]) for key in (better, worse)]
                    margin = float(np.nansum(scores[0]) - np.nansum(scores[1]))
                    number += 1
                    yield PairPlace(part, row, number, (better, worse), margin), scores

    def pair(self, place: PairPlace) -> ScoredPair:
        """One pair whole."""
        comparison = self._tables[place.part].comparison(place.row)
        better, worse = (self.store[key] for key in place.keys)
        both = _as_written(comparison, (better, worse))
        part = self._part(place)
        return ScoredPair(both, part, place.number, (better, worse), place.margin)

    def texts(self, wanted: Collection[str]) -> dict[str, str]:
        """The responses of the pairs that have one of these keys, by key."""
        found: dict[str, str] = {}
        for place, _ in self.places():
            if any(key in wanted and key not in found for key in place.keys):
                responses = self._tables[place.part].comparison(place.row).responses
                both = zip(place.keys, responses, strict=True)
                found |= {key: text for key, text in both if key in wanted}
        return found

    @cached_property
    def _parts(self) -> dict[str, TokenTable]:
        folder = self.run.path / "pairs" / self.run.manifests["reference"].inputs["pairs"]
        encoded = self.run.path / "encoded" / read_manifest(folder).inputs["encoded"]
        return read_parts(folder / PAIRS, EncodedStore.open([encoded / ENCODED]))

    @cached_property
    def _tables(self) -> dict[str, TokenTable]:
        """The run's pairs in the order of its data: those that something trained on, and those to evaluate on."""
        train = self._parts["train"].then(self._parts["eval_reward"])
        return {"train": train.choose(self._order(train)), "eval": self._parts["eval"]}

    @staticmethod
    def _order(train: TokenTable) -> np.ndarray:
        return np.argsort(train.first_rows, kind="stable")

    def _part(self, place: PairPlace) -> str:
        if place.part == "eval":
            return "held out"
        apart = set(self._parts["eval_reward"].first_rows.tolist())
        return "eval_reward" if int(self._tables["train"].first_rows[place.row]) in apart else "train"


def _as_written(pair: Comparison, records: Sequence[TokenRecord]) -> Comparison:
    """A pair with the texts in which its tokens' bytes are counted, and spans of known value in these."""
    texts = tuple(
        text if record.text is None else record.text
        for text, record in zip(pair.responses, records, strict=True)
    )
    spans = pair.spans
    if spans is not None:
        sides = zip(spans, pair.responses, texts, strict=True)
        spans = tuple(
            own if text == response else tuple(moved(own, response, text, pair.source))
            for own, response, text in sides
        )
    return replace(pair, responses=texts, spans=spans)


def only_alone(run: RunFolder) -> bool:
    """Whether every comparison of a run has one response, which no pair can be made of."""
    if "data" not in run.manifests:
        return False
    facts = run.manifests["data"].facts
    alone = sum(facts.get("unpaired", {}).values())
    return bool(alone) and alone == facts["train"] + facts["eval"]


def _usual_scorer(store: TokenStore) -> str:
    """The scorer of a run whose policy has none that is stored: what its stored values were made for."""
    first = next(iter(store), None)
    values = store[first].values if first is not None else {}
    return "reward" if "reward" in values else "log_ratio" if "oracle_logp" in values else "surprisal"


class Drawn(NamedTuple):
    """Which pairs are shown, and how they were chosen.

    Attributes:
        places: The pairs shown.
        reasons: Per pair, why: ``random``, ``margin`` (one of the largest), ``wrong`` (the most contradicted), or
            ``spans`` (a response of it is one of those asked for).
        sample: Pairs drawn at random for statistics; those shown as ``random`` come first.
        total: How many pairs the run has.
        values: ``[n]``, all scores of the run end to end.
    """

    places: list[PairPlace]
    reasons: list[tuple[str, ...]]
    sample: list[PairPlace]
    total: int
    values: np.ndarray


def draw(reader: PairReader, count: int, *, sample: int, wanted: Set[str] = frozenset()) -> Drawn:
    """A quarter of the pairs with the largest margins, up to a quarter whose scores contradict them most, the rest at random.

    Args:
        reader: Gives the pairs.
        count: How many to show; all of them where there are no more.
        sample: How many to draw for statistics.
        wanted: Keys of responses whose pairs come before those drawn at random, up to half of ``count``.

    Raises:
        UserError: no pair of the data is in the score store.
    """
    places, values = [], []
    for place, scores in reader.places():
        places.append(place)
        values += scores
    if not places:
        raise UserError(
            f"none of the pairs in {reader.run.path / 'data'} is in the score store beside it, so there is nothing to show. "
            "Run the recipe again: tokenward run RECIPE."
        )
    order = np.random.default_rng(reader.run.seed).permutation(len(places)).tolist()
    margins = np.array([place.margin for place in places])
    by_margin = np.argsort(-margins, kind="stable").tolist()
    quarter = max(count // 4, 1)
    ends = {
        "margin": by_margin[:quarter],
        "wrong": [number for number in by_margin[::-1][:quarter] if margins[number] < 0],
    }
    asked = [number for number in order if not wanted.isdisjoint(places[number].keys)]
    ends["spans"] = asked[: max(count // 2, 1)]
    extreme = {number for numbers in ends.values() for number in numbers}
    others = np.cumsum([number not in extreme for number in order])
    drawn = order[: int(np.searchsorted(others, count - len(extreme), side="right"))]
    chosen: dict[int, tuple[str, ...]] = {}
    for reason, numbers in {"random": drawn, **ends}.items():
        for number in numbers:
            chosen[number] = (*chosen.get(number, ()), reason)
    return Drawn(
        places=[places[number] for number in chosen],
        reasons=list(chosen.values()),
        sample=[places[number] for number in order[:sample]],
        total=len(places),
        values=np.concatenate(values),
    )
