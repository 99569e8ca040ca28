"""The pairs of a finished run with their scores, and the choice of pairs for a report."""

from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from tokenward.artifacts import read_manifest
from tokenward.errors import UserError
from tokenward.evaluation.statistics import Figure, mean_figure
from tokenward.report.collect import RunFolder
from tokenward.report.selections import stored_scorer
from tokenward.scoring.scorers import SCORERS, Scorer
from tokenward.scoring.store import TokenRecord, TokenStore
from tokenward.stages.preview import Preview
from tokenward.tokens.segments import moved
from tokenward.tokens.store import ENCODED, EncodedStore
from tokenward.tokens.table import PAIRS, TokenTable, read_parts
from tokenward.types import Comparison


class PairPlace(NamedTuple):
    """A pair by its row in a part (``train`` or ``eval``), its number in the run from 1, and its keys in the score store.

    The margin is the sum of the chosen response's scores minus the sum of the rejected one's.
    """

    part: str
    row: int
    number: int
    keys: tuple[str, str]
    margin: float


class ScoredPair(NamedTuple):
    """A pair with its stored values, the chosen response first. Its part is ``train``, ``eval`` or ``eval_reward``."""

    comparison: Comparison
    part: str
    number: int
    records: tuple[TokenRecord, TokenRecord]


def scores_of(scorer: Scorer, record: TokenRecord) -> np.ndarray:
    """Scores of one stored response.  -> [n] float32"""
    return torch.as_tensor(scorer(record), dtype=torch.float32).detach().numpy()


READ = {"data", "reference", "scores"}
"""Stages whose files a pair is read from."""


@dataclass(frozen=True, kw_only=True)
class PairReader:
    """Reads the pairs of a run from its data and its score store.

    The scorer is the run's own, or a built-in one if the scores of the run's own are not stored. ``preview`` is set if the
    values are those of a preview.
    """

    run: RunFolder
    store: TokenStore | Mapping[str, TokenRecord]
    scorer_name: str
    scorer: Scorer
    preview: Preview | None = None

    @classmethod
    def open(cls, run: RunFolder) -> "PairReader | None":
        """A reader of a run's pairs; None for a run without scores, such as an online run, or without pairs."""
        if READ - set(run.manifests) or is_unpaired(run):
            return None
        store = TokenStore(run.path / "scores")
        usual = _usual_scorer(store)
        name, scorer = stored_scorer(run) or (usual, SCORERS[usual]())
        return cls(run=run, store=store, scorer_name=name, scorer=scorer)

    @classmethod
    def of_preview(cls, run: RunFolder) -> "PairReader | None":
        """A reader of the few pairs that the oracle scored while it trained; None if there are none."""
        preview = run.preview() if {"data", "reference"} <= set(run.manifests) else None
        if preview is None:
            return None
        name = _usual_scorer(preview.records)
        scorer = SCORERS[name]()
        return cls(run=run, store=preview.records, scorer_name=name, scorer=scorer, preview=preview)

    def places(self) -> Iterator[tuple[PairPlace, list[np.ndarray]]]:
        """Every pair whose responses are in the store, with the scores of both."""
        number = 0
        for part, table in self._tables.items():
            for row in np.flatnonzero(table.sizes == 2).tolist():
                first = int(table.starts[row])
                better, worse = (f"{key:016x}" for key in table.keys[first : first + 2].tolist())
                number += 1
                if better in self.store and worse in self.store:
                    scores = [scores_of(self.scorer, self.store[key]) for key in (better, worse)]
                    margin = float(np.nansum(scores[0]) - np.nansum(scores[1]))
                    yield PairPlace(part, row, number, (better, worse), margin), scores

    @property
    def total(self) -> int:
        """Number of pairs of the run."""
        return sum(int((table.sizes == 2).sum()) for table in self._tables.values())

    def pair(self, place: PairPlace) -> ScoredPair:
        """A pair with its texts and stored values."""
        table = self._tables[place.part]
        better, worse = (self.store[key] for key in place.keys)
        both = _with_token_texts(table.comparison(place.row), (better, worse))
        part = place.part
        if part == "train" and int(table.first_rows[place.row]) in self._eval_reward_rows:
            part = "eval_reward"
        return ScoredPair(both, part, place.number, (better, worse))

    def texts(self, wanted: Collection[str]) -> dict[str, str]:
        """The responses with these keys, as far as pairs of the run have them."""
        found: dict[str, str] = {}
        for place, _ in self.places():
            if any(key in wanted and key not in found for key in place.keys):
                responses = self._tables[place.part].comparison(place.row).responses
                both = zip(place.keys, responses, strict=True)
                found |= {key: text for key, text in both if key in wanted}
        return found

    @cached_property
    def _parts(self) -> dict[str, TokenTable]:
        # An oracle with another tokenizer has pairs of its own; the scores are those of the policy's.
        scores = {} if self.preview is not None else self.run.manifests["scores"].inputs
        pairs = scores.get("pairs", self.run.manifests["reference"].inputs["pairs"])
        folder = self.run.path / "pairs" / pairs
        encoded = self.run.path / "encoded" / read_manifest(folder).inputs["encoded"]
        for place in (encoded, folder):
            read_manifest(place).check_files(place)
        return read_parts(folder / PAIRS, EncodedStore.open([encoded / ENCODED]))

    @cached_property
    def _tables(self) -> dict[str, TokenTable]:
        """The training pairs, those of the eval reward model included, in the order of the data; and the eval pairs."""
        train = self._parts["train"].then(self._parts["eval_reward"])
        order = np.argsort(train.first_rows, kind="stable")
        return {"train": train.choose(order), "eval": self._parts["eval"]}

    @cached_property
    def _eval_reward_rows(self) -> set[int]:
        return set(self._parts["eval_reward"].first_rows.tolist())


def _with_token_texts(pair: Comparison, records: Sequence[TokenRecord]) -> Comparison:
    """The pair with the texts whose bytes the tokens count, which may hold context, and its spans in these texts."""
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


def is_unpaired(run: RunFolder) -> bool:
    """Whether every row of a run has a single response, so that there are no pairs."""
    if "data" not in run.manifests:
        return False
    facts = run.manifests["data"].facts
    unpaired = sum(facts.get("unpaired", {}).values())
    return bool(unpaired) and unpaired == facts["train"] + facts["eval"]


def _usual_scorer(store: TokenStore | Mapping[str, TokenRecord]) -> str:
    """The built-in scorer that the stored values were made for."""
    first = next(iter(store), None)
    values = store[first].values if first is not None else {}
    return "reward" if "reward" in values else "log_ratio" if "oracle_logp" in values else "surprisal"


class Drawn(NamedTuple):
    """The pairs of a report, and a random sample for statistics, which begins with those of the reason ``random``.

    The reasons of a pair are ``random``, ``margin`` (one of the largest), ``wrong`` (the scores contradict its order most)
    and ``spans`` (one of its responses was requested). ``values`` are all scores of the run, concatenated. ``agreement`` is
    the share of pairs, of the eval pairs if there are any, whose scores agree with their order.
    """

    places: list[PairPlace]
    reasons: list[tuple[str, ...]]
    sample: list[PairPlace]
    total: int
    values: np.ndarray
    agreement: Figure


def draw(reader: PairReader, count: int, *, sample: int, wanted: Set[str] = frozenset()) -> Drawn:
    """Choose pairs: a quarter with the largest margins, up to a quarter with the most negative ones, the rest at random.

    Pairs that have a response among the keys ``wanted`` come before random ones, up to half of ``count``.

    Raises:
        UserError: no pair of the data is in the score store.
    """
    places, values = [], []
    for place, scores in reader.places():
        places.append(place)
        values += scores
    if not places:
        raise UserError(
            f"no pair of {reader.run.path / 'data'} is in the score store of the run. Run the recipe again: "
            "`tokenward run RECIPE`.",
            code="stale-scores",
        )
    order = np.random.default_rng(reader.run.seed).permutation(len(places)).tolist()
    margins = np.array([place.margin for place in places])
    by_margin = np.argsort(-margins, kind="stable").tolist()
    quarter = max(count // 4, 1)
    ends = {
        "margin": by_margin[:quarter],
        "wrong": [number for number in by_margin[::-1][:quarter] if margins[number] < 0],
        "spans": [number for number in order if not wanted.isdisjoint(places[number].keys)][
            : max(count // 2, 1)
        ],
    }
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
        total=reader.total,
        values=np.concatenate(values),
        agreement=_agreement(places),
    )


def _agreement(places: Sequence[PairPlace]) -> Figure:
    told = [place for place in places if place.part == "eval"] or places
    margins = np.array([place.margin for place in told])
    return mean_figure((margins > 0) + 0.5 * (margins == 0))
