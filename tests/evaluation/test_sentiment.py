"""VADER's score, and the words that make it."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenward.evaluation.sentiment import Vader
from tokenward.types import Span

VADER = Vader()

TEXTS = [
    "good",
    "The film was good and the food was great",
    "a terrible sad story with one good joke",
    "It was not good",
    "I never liked this awful place",
    "It was very good and extremely bad",
    "The start was great but the end was awful",
    "kind of good",
    "It was kind of good but I hated the noise",
    "nothing here at all",
    "VERY GOOD food and bad service",
    "good good good bad",
    "the least good of the good ones",
    "😀 what a day",
    "the food was good 😭",
    "without doubt a great love",
    "This is so very very good",
    "it is the bomb",
    "I do not think it is bad or ugly",
]


def squashed(total: float) -> float:
    """VADER's own way from a sum to a number between -1 and 1."""
    return total / math.sqrt(total * total + 15)


def test_the_values_sum_to_what_the_compound_is_made_of():
    for text in TEXTS:
        total = sum(span.value for span in VADER.word_spans(text))
        assert VADER.compound(text) == pytest.approx(squashed(total), abs=6e-5), (
            text
        )  # VADER rounds to 4 places


WORDS = ["good", "bad", "great", "awful", "not", "never", "very", "slightly", "but", "film", "the", "kind", "of",
         "least", "at", "least", "without", "doubt", "so", "GREAT", "no", "love", "😀", "hate", "x", "."]  # fmt: skip


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=14))
@settings(max_examples=100, deadline=None)
def test_the_values_sum_to_the_compound_of_any_text(words):
    text = " ".join(words)
    spans = VADER.word_spans(text)
    assert VADER.compound(text) == pytest.approx(squashed(sum(span.value for span in spans)), abs=6e-5)
    ends = [0, *(span.end for span in spans)]
    assert all(span.start >= end for span, end in zip(spans, ends, strict=False))


def spelled(text: str) -> list[tuple[str, float]]:
    return [(text[span.start : span.end], round(span.value, 4)) for span in VADER.word_spans(text)]


def test_words_with_their_valence_of_the_lexicon():
    assert spelled("The food was good, and the waiter rude.") == [("good", 1.9), ("rude", -2.0)]
    assert VADER.word_spans("good") == [Span(0, 4, 1.9)]
    assert VADER.word_spans("nothing to see") == []
    assert VADER.word_spans("") == []


def test_negation_turns_the_word_and_has_no_value_itself():
    assert spelled("It was not good") == [("good", round(1.9 * -0.74, 4))]


def test_a_booster_strengthens_its_word_and_has_no_value_itself():
    assert spelled("It was very good") == [("good", round(1.9 + 0.293, 4))]
    assert spelled("It was slightly good") == [("good", round(1.9 - 0.293, 4))]


def test_but_weakens_what_is_before_and_strengthens_what_is_after():
    assert spelled("The start was good but the end was bad") == [("good", 1.9 * 0.5), ("bad", -2.5 * 1.5)]


def test_an_emoji_is_one_span():
    text = "bad 😍 end"
    # "smiling face with heart-eyes": of its words only "smiling" is in the lexicon.
    assert spelled(text) == [("bad", -2.5), ("😍", 2.0)]


def test_words_around_an_emoji_keep_their_place():
    text = "😀😀 good"
    spans = VADER.word_spans(text)
    assert [text[span.start : span.end] for span in spans][-1] == "good"
    assert all(0 <= span.start < span.end <= len(text) for span in spans)


def test_repeated_and_contained_words_are_found_where_they_stand():
    text = "goodness, good; goods good"
    assert [(span.start, span.end) for span in VADER.word_spans(text)] == [(0, 8), (10, 14), (22, 26)]


def test_emoticons_and_punctuation_are_placed():
    text = "(good) :) ... bad!"
    spans = [text[span.start : span.end] for span in VADER.word_spans(text)]
    assert spans == ["good", ":)", "bad"]


def test_compound_is_vaders_own():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyzer = SentimentIntensityAnalyzer()
    for text in [*TEXTS, "Great!!!", "What??? Awful", ""]:
        assert VADER.compound(text) == analyzer.polarity_scores(text)["compound"], text
