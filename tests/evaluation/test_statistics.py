"""Figures with their intervals."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from tokenward.evaluation.statistics import (
    Figure,
    auroc,
    average_precision,
    mean_figure,
    precision_at_k,
    ranking_figure,
)


def test_auroc_by_hand():
    # Pairs of positive (3, 1) over negative (2, 1): 3 > 2, 3 > 1, 1 < 2, 1 = 1.
    assert auroc([3, 2, 1, 1], [True, False, True, False]) == (1 + 1 + 0 + 0.5) / 4
    # The second positive counts three times.
    assert auroc([3, 2, 1, 1], [True, False, True, False], [1, 1, 3, 1]) == (2 + 3 * 0.5) / 8


LABELLED = st.lists(
    st.tuples(st.integers(-3, 3), st.booleans(), st.integers(1, 4)), min_size=2, max_size=40
).filter(lambda items: len({label for _, label, _ in items}) == 2)


@given(LABELLED)
@settings(max_examples=60, deadline=None)
def test_rankings_equal_sklearn_with_ties_and_weights(items):
    scores, labels, weights = (list(column) for column in zip(*items, strict=True))
    for ours, theirs in ((auroc, roc_auc_score), (average_precision, average_precision_score)):
        assert ours(scores, labels) == pytest.approx(theirs(labels, scores), abs=1e-12)
        expected = theirs(labels, scores, sample_weight=weights)
        assert ours(scores, labels, weights) == pytest.approx(expected, abs=1e-12)


def test_average_precision_by_hand():
    # Thresholds 3 (1 of 1 positive), 2 (1 of 2), 1 (2 of 4): a half of the positives at 1, a half at 2 / 4.
    assert average_precision([3, 2, 1, 1], [True, False, True, False]) == (1 + 2 / 4) / 2
    # The second positive counts three times: 4 positives, 3 of them where 4 of 6 are positive.
    assert average_precision([3, 2, 1, 1], [True, False, True, False], [1, 1, 3, 1]) == pytest.approx(
        1 / 4 + 3 / 4 * 4 / 6
    )


def test_average_precision_without_a_positive_is_not_a_number_and_without_a_negative_1():
    assert math.isnan(average_precision([1.0, 2.0], [False, False]))
    assert math.isnan(average_precision([], []))
    assert average_precision([1.0, 2.0], [True, True]) == 1.0


def test_a_response_that_was_not_drawn_counts_for_nothing():
    """The first threshold has no token at all under these weights."""
    assert average_precision([2, 1, 0], [False, True, False], [0, 1, 1]) == 1.0


@pytest.mark.parametrize("labels", [[True, True], [False, False], []])
def test_auroc_without_both_kinds_is_not_a_number(labels):
    assert math.isnan(auroc([0.0] * len(labels), labels))


@pytest.mark.parametrize(
    ("scores", "positive", "expected"),
    [
        ([0.9, 0.8, 0.1, 0.2], [True, False, False, True], 1 / 2),  # of 0.9 and 0.8 one is positive
        ([0.9, 0.8, 0.1], [True, True, False], 1.0),
        ([0.9, 0.8, 0.1], [False, False, True], 0.0),
        ([1, 1, 1, 1], [True, False, False, False], 1 / 4),  # all tie: the share of positives
        (
            [2, 1, 1, 0],
            [True, True, False, True],
            (1 + 2 * 1 / 2) / 3,
        ),  # both of the tied ones are in the three
        (
            [3, 1, 1, 1],
            [False, True, True, False],
            (0 + 1 * 2 / 3) / 2,
        ),  # one of three tied fills the second place
    ],
)
def test_precision_at_k_by_hand(scores, positive, expected):
    assert precision_at_k(scores, positive) == pytest.approx(expected, abs=1e-12)


def test_precision_at_a_given_k():
    scores, positive = [5, 4, 3, 3, 1], [True, False, True, False, True]
    found = [precision_at_k(scores, positive, k) for k in (1, 2, 3, 4, 5, 9)]
    # The third place is shared by a positive and a negative; more than five there are not.
    assert found == pytest.approx([1, 1 / 2, 1.5 / 3, 2 / 4, 3 / 5, 3 / 5])
    assert math.isnan(precision_at_k(scores, [False] * 5, 2))
    assert math.isnan(precision_at_k([], []))


def test_mean_figure_agrees_with_scipy():
    data = np.random.default_rng(3).exponential(size=80)
    found = mean_figure(data, resamples=9999)
    expected = stats.bootstrap((data,), np.mean, method="percentile", n_resamples=9999, rng=1)
    width = found.high - found.low
    assert found.value == pytest.approx(data.mean(), abs=1e-12)
    assert found.n == 80
    assert found.low == pytest.approx(expected.confidence_interval.low, abs=0.03 * width)
    assert found.high == pytest.approx(expected.confidence_interval.high, abs=0.03 * width)


def test_the_interval_holds_the_truth_95_times_in_100():
    rng = np.random.default_rng(0)
    figures = [mean_figure(rng.normal(1.5, 2.0, size=60), resamples=500, seed=seed) for seed in range(400)]
    covered = np.mean([figure.low <= 1.5 <= figure.high for figure in figures])
    # A percentile interval of 60 values covers about 94 %; 400 draws leave a standard error of 1.2 %.
    assert 0.90 < covered < 0.98
    widths = np.mean([figure.high - figure.low for figure in figures])
    assert widths == pytest.approx(2 * 1.96 * 2.0 / math.sqrt(60), rel=0.05)


def test_one_value_and_equal_values_have_no_width():
    assert mean_figure([2.0]) == Figure(2.0, 2.0, 2.0, 1)
    assert mean_figure([True, True]) == Figure(1.0, 1.0, 1.0, 2)


def is_empty(figure: Figure) -> bool:
    return figure.n == 0 and all(math.isnan(part) for part in figure[:3])


def test_nothing_measured_is_not_a_number_with_n_0():
    assert is_empty(mean_figure([]))
    assert is_empty(ranking_figure("auroc", [([], [], []), ([], [], [])]))


def tokens(responses: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    example = np.repeat(np.arange(responses), 12)
    positive = rng.random(len(example)) < 0.25
    # Tokens of a response move together, which is why the interval draws responses.
    scores = rng.normal(size=len(example)) + positive + 1.5 * rng.normal(size=responses)[example]
    return scores, positive, example


@pytest.mark.parametrize(
    ("name", "score"), [("auroc", roc_auc_score), ("average_precision", average_precision_score)]
)
def test_the_figure_of_one_is_sklearns_and_twice_the_examples_have_a_narrower_interval(name, score):
    scores, positive, example = tokens(40)
    once = ranking_figure(name, [(scores, positive, example)], resamples=2000)
    doubled = np.tile(scores, 2), np.tile(positive, 2), np.concatenate([example, example + 40])
    twice = ranking_figure(name, [doubled], resamples=2000)
    assert (once.value, twice.value) == pytest.approx([score(positive, scores)] * 2, abs=1e-12)
    assert (once.n, twice.n) == (40, 80)
    # The interval shrinks by the root of 2.
    assert (once.high - once.low) / (twice.high - twice.low) == pytest.approx(math.sqrt(2), rel=0.1)


def test_a_ranking_counts_the_responses_that_have_tokens() -> None:
    scores, positive = np.array([0.1, 0.7, 0.4, 0.9]), np.array([False, True, True, False])
    first, second = (
        ranking_figure("auroc", [(scores, positive, example)], resamples=100)
        for example in ([0, 0, 1, 1], [3, 3, 9, 9])
    )
    assert first == second
    assert first.n == 2


@pytest.mark.parametrize("name", ["auroc", "average_precision"])
def test_intervals_draw_whole_responses(name):
    """Tokens that are copies of each other are one observation, however many there are."""
    rng = np.random.default_rng(2)
    positive = np.arange(30) % 2 == 0
    scores = rng.normal(size=30) + positive
    one_each = ranking_figure(name, [(scores, positive, np.arange(30))], resamples=500)
    copies = ranking_figure(
        name, [tuple(np.repeat(values, 20) for values in (scores, positive, np.arange(30)))], resamples=500
    )
    assert copies == pytest.approx(one_each, abs=1e-12)


def test_mean_auroc_is_the_mean_and_its_interval_that_of_one_joint_draw():
    scores, positive, example = tokens(40)
    same = ranking_figure("auroc", [(scores, positive, example)] * 2, resamples=300)
    alone = ranking_figure("auroc", [(scores, positive, example)], resamples=300)
    assert same == pytest.approx(alone, abs=1e-12)
    # A question and its opposite always sum to 1: drawn together the mean has no width.
    opposite = ranking_figure(
        "auroc", [(scores, positive, example), (-scores, positive, example)], resamples=300
    )
    assert opposite == pytest.approx(Figure(0.5, 0.5, 0.5, 40), abs=1e-12)
