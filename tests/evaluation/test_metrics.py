"""Metrics of generated text."""

import math

import pytest

from tokenward.errors import UserError
from tokenward.evaluation.metrics import METRICS, apply_metric
from tokenward.evaluation.sentiment import Vader

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
    ],
)
def test_what_is_not_one_finite_number_each_is_refused(returned, message):
    with pytest.raises(UserError, match=message):
        applied("mine", lambda prompts, completions: returned, ["a", "b", "c"])


def test_a_metric_that_compares_with_references_says_that_there_are_none():
    with pytest.raises(UserError, match="references"):
        applied("rougeL", METRICS["rougeL"], ["a", "b", "c"])


@pytest.mark.parametrize("returned", [None, [None, 1.0, 2.0], ["good", 1.0, 2.0], 3.0])
def test_what_is_no_number_is_refused(returned):
    with pytest.raises(UserError, match="mine"):
        applied("mine", lambda prompts, completions: returned, ["a", "b", "c"])
