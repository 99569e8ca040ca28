"""Metrics of generated text."""

import math

import pytest

from tokenward.errors import UserError
from tokenward.evaluation.metrics import METRICS, apply_metric
from tokenward.evaluation.sentiment import Vader

PROMPTS = ["p", "q", "r"]


def test_distinct_2_by_hand():
    completions = ["a b a b", "a b c", "alone", "", "x x x x x"]
    # "a b", "b a", "a b": two of three are different; five x make one pair of four.
    expected = [2 / 3, 1.0, 1.0, 1.0, 1 / 4]
    assert METRICS["distinct_2"](prompts=[""] * 5, completions=completions) == pytest.approx(expected)


def test_vader_is_the_compound_of_each_completion():
    completions = ["a good day", "a bad day", "a day"]
    found = apply_metric("vader", METRICS["vader"], PROMPTS, completions)
    assert found == [Vader().compound(text) for text in completions]
    assert found[0] > found[2] == 0 > found[1]


def test_a_metric_is_called_as_trl_calls_a_reward_function():
    calls = []

    def lengths(prompts, completions, **columns):
        calls.append((prompts, completions, columns))
        return [len(text) for text in completions]

    assert apply_metric("lengths", lengths, tuple(PROMPTS), ("a", "bb", "")) == [1.0, 2.0, 0.0]
    assert calls == [(PROMPTS, ["a", "bb", ""], {})]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 2.0], r"the metric mine returned 2 values for 3 completions\. "),
        ([1.0, math.nan, 2.0], r"not finite at \[1\]"),
        ([math.inf, 0.0, -math.inf], r"not finite at \[0, 2\]"),
    ],
)
def test_what_is_not_one_finite_number_each_is_refused(returned, message):
    with pytest.raises(UserError, match=message):
        apply_metric("mine", lambda prompts, completions: returned, PROMPTS, ["a", "b", "c"])


@pytest.mark.parametrize("returned", [None, [None, 1.0, 2.0], ["good", 1.0, 2.0], 3.0])
def test_what_is_no_number_is_refused(returned):
    with pytest.raises(UserError, match="mine"):
        apply_metric("mine", lambda prompts, completions: returned, PROMPTS, ["a", "b", "c"])
