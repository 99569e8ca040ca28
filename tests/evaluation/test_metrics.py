"""Metrics of generated text."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from tokenward.errors import UserError
from tokenward.evaluation.replies import METRICS, Vader, apply_metric

PROMPTS = ["p", "q", "r"]
WHERE = ["rows:1", "rows:2", "rows:3"]


def applied(name, metric, completions):
    return apply_metric(name, metric, PROMPTS, completions, [[1], [2], [3]], columns={}, where=WHERE)


def test_distinct_2_by_hand():
    completions = ["a b a b", "a b c", "alone", "", "x x x x x"]
    # "a b", "b a", "a b": two of three are different; five x make one pair of four.
    expected = [2 / 3, 1.0, 1.0, 1.0, 1 / 4]
    assert METRICS["distinct_2"](prompts=[""] * 5, completions=completions) == pytest.approx(expected)


def test_vader_is_the_compound_of_each_completion():
    completions = ["a good day", "a bad day", "a day"]
    found = applied("vader", METRICS["vader"], completions)
    assert found == [Vader().compound(text) for text in completions]
    assert found[0] > found[2] == 0 > found[1]


def test_a_metric_is_called_as_trl_calls_a_reward_function():
    calls = []

    def lengths(prompts, completions, **columns):
        calls.append((prompts, completions, columns))
        return [len(text) for text in completions]

    assert applied("lengths", lengths, ("a", "bb", "")) == [1.0, 2.0, 0.0]
    assert calls == [(PROMPTS, ["a", "bb", ""], {"completion_ids": [[1], [2], [3]]})]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 2.0], r"rows:3: the metric mine returned .*2 scores for 3 completions"),
        ([1.0, math.nan, 2.0], r"rows:2: the metric mine returned nan"),
        ([math.inf, 0.0, -math.inf], r"rows:1: the metric mine returned inf"),
        (None, "mine"),
        ([None, 1.0, 2.0], "mine"),
        (["good", 1.0, 2.0], "mine"),
        (3.0, "mine"),
    ],
)
def test_what_is_not_one_finite_number_each_is_refused(returned, message):
    with pytest.raises(UserError, match=message):
        applied("mine", lambda prompts, completions: returned, ["a", "b", "c"])


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


def check_sum(text):
    """The values of the words sum to what VADER squashes into the compound, rounded to 4 places."""
    spans = VADER.word_spans(text)
    total = sum(span.value for span in spans)
    compound = SentimentIntensityAnalyzer().polarity_scores(text)["compound"]
    assert VADER.compound(text) == compound == pytest.approx(total / math.sqrt(total**2 + 15), abs=6e-5), text
    ends = [0, *(span.end for span in spans)]
    assert all(span.start >= end for span, end in zip(spans, ends, strict=False))


def test_the_values_of_words_sum_to_the_compound():
    for text in TEXTS:
        check_sum(text)
    for text in ("Great!!!", "What??? Awful", ""):  # punctuation is no word
        assert VADER.compound(text) == SentimentIntensityAnalyzer().polarity_scores(text)["compound"]


WORDS = ["good", "bad", "great", "awful", "not", "never", "very", "slightly", "but", "film", "the", "kind", "of",
         "least", "at", "least", "without", "doubt", "so", "GREAT", "no", "love", "😀", "hate", "x", "."]  # fmt: skip


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=14))
@settings(max_examples=100, deadline=None)
def test_the_values_of_words_sum_to_the_compound_of_any_text(words):
    check_sum(" ".join(words))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The food was good, and the waiter rude.", [("good", 1.9), ("rude", -2.0)]),
        ("nothing to see", []),
        ("", []),
        # Negation and boosters change their word, and have no value themselves.
        ("It was not good", [("good", -1.406)]),  # 1.9 x -0.74
        ("It was very good", [("good", 2.193)]),  # 1.9 + 0.293
        ("It was slightly good", [("good", 1.607)]),
        ("The start was good but the end was bad", [("good", 1.9 * 0.5), ("bad", -2.5 * 1.5)]),
        # "smiling face with heart-eyes": of its words only "smiling" is in the lexicon.
        ("bad 😍 end", [("bad", -2.5), ("😍", 2.0)]),
        ("(good) :) ... bad!", [("good", 1.9), (":)", 2.0), ("bad", -2.5)]),
    ],
)
def test_words_have_their_valence_in_this_text(text, expected):
    assert [
        (text[span.start : span.end], round(span.value, 4)) for span in VADER.word_spans(text)
    ] == expected
