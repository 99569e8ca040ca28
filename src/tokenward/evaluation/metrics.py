"""Metrics of generated text, with the signature of TRL's reward functions."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from vaderSentiment.vaderSentiment import BOOSTER_DICT, SentimentIntensityAnalyzer, SentiText

from tokenward.sampling.sources import ChrF, Meteor, Rouge, call_source
from tokenward.types import Span

Metric = Callable[..., Sequence[float]]
"""``f(prompts, completions, **columns) -> list[float]``: one number per completion, higher is more of it."""


def vader(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """VADER's compound sentiment of each completion, from -1 to 1."""
    scorer = Vader()
    return [scorer.compound(text) for text in completions]


def distinct_2(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """Share of different word pairs among all word pairs of each completion; 1 for fewer than two words."""

    def share(text: str) -> float:
        words = text.split()
        pairs = list(pairwise(words))
        return len(set(pairs)) / len(pairs) if pairs else 1.0

    return [share(text) for text in completions]


METRICS: dict[str, Metric] = {
    "vader": vader,
    "distinct_2": distinct_2,
    # These compare with references, which an online run's examples have.
    "rouge1": Rouge(type="rouge1"),
    "rouge2": Rouge(type="rouge2"),
    "rougeL": Rouge(type="rougeL"),
    "rougeLsum": Rouge(type="rougeLsum"),
    "meteor": Meteor(),
    "chrf": ChrF(),
}


def apply_metric(
    name: str,
    metric: Metric,
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    *,
    columns: Mapping[str, Sequence[Any]],
    where: Sequence[str],
) -> list[float]:
    """Call a metric as a preference source is called, and check what it returns.

    Raises:
        UserError: it returned something else than one finite number per completion, or lacks a column.
    """
    return call_source(name, metric, prompts, completions, completion_ids, columns, where, kind="metric")


class Vader:
    """The rule-based sentiment scorer of Hutto and Gilbert (ICWSM 2014).

    It sums the valence of words it knows, changed by negation, boosters and "but", so the words
    that carry a text's score are known exactly.
    """

    def __init__(self) -> None:
        self._analyzer = SentimentIntensityAnalyzer()

    def compound(self, text: str) -> float:
        """Sentiment of a whole text, from -1 (most negative) to 1 (most positive)."""
        return self._analyzer.polarity_scores(text)["compound"]

    def word_spans(self, text: str) -> list[Span]:
        """Each word that adds to the text's score, with its valence (about -4 to 4) in this text.

        The values are those that :meth:`compound` adds up before punctuation and squashing.
        """
        expanded, origin = self._expand_emoji(text)
        parsed = SentiText(expanded)
        words = parsed.words_and_emoticons
        valences: list[float] = []
        for index, word in enumerate(words):
            # Boosters ("very") and "kind of" act on other words; VADER gives them no valence of their own.
            kind_of = index + 1 < len(words) and word.lower() == "kind" and words[index + 1].lower() == "of"
            if kind_of or word.lower() in BOOSTER_DICT:
                valences.append(0.0)
            else:
                valences = self._analyzer.sentiment_valence(0, parsed, word, index, valences)
        valences = self._analyzer._but_check(words, valences)
        return [
            Span(origin[span.start], origin[span.end - 1] + 1, span.value)
            for span in _locate(expanded, words, valences)
        ]

    def _expand_emoji(self, text: str) -> tuple[str, list[int]]:
        """The text as VADER reads it (emoji in words), and for each of its characters the index it came from."""
        expanded, origin = "", []
        for index, character in enumerate(text):
            piece = self._analyzer.emojis.get(character, character)
            if character in self._analyzer.emojis and expanded and not expanded.endswith(" "):
                piece = " " + piece
            expanded += piece
            origin += [index] * len(piece)
        return expanded, origin


def _locate(text: str, words: list[str], valences: list[float]) -> list[Span]:
    """VADER splits at white space and strips punctuation, in order: so each word is found left to right."""
    spans, start = [], 0
    for word, valence in zip(words, valences, strict=True):
        start = text.index(word, start)
        if valence:
            spans.append(Span(start, start + len(word), float(valence)))
        start += len(word)
    return spans
