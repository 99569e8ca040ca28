"""Win rates: ties, and a length effect taken out on planted data."""

import math

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from tokenward.evaluation.replies import length_controlled, preferences, win_figures


def planted(count, *, quality, length, longer, seed=0):
    """Preferences that come from quality and length by a known law, with replies that are mostly longer."""
    rng = np.random.default_rng(seed)
    difference = rng.normal(longer, 100.0, count)
    feature = np.tanh(difference / difference.std())
    chance = 1 / (1 + np.exp(-(quality + length * feature)))
    return (rng.random(count) < chance).astype(float), difference


def test_preferences_by_hand():
    assert preferences([1.0, 2.0, 3.0], [2.0, 1.0, 3.0]) == [1.0, 0.0, 0.5]
    assert preferences([-math.inf, -math.inf], [0.0, -math.inf]) == [1.0, 0.5]


def test_a_win_rate_that_is_only_length_falls_to_a_half():
    preferred, difference = planted(600, quality=0.0, length=3.0, longer=150.0)
    assert preferred.mean() > 0.8
    figure = length_controlled(preferred, difference, resamples=200)
    assert figure.low < 0.5 < figure.high
    assert abs(figure.value - 0.5) < 0.15
    assert figure.n == 600


def test_quality_at_equal_length_stays():
    preferred, difference = planted(600, quality=1.0, length=0.0, longer=150.0)
    figure = length_controlled(preferred, difference, resamples=200)
    assert figure.low < 1 / (1 + math.exp(-1)) < figure.high
    assert figure.low > 0.5


def test_the_fit_is_scikit_learns():
    preferred, difference = planted(80, quality=0.5, length=1.0, longer=50.0)
    features = np.stack([np.ones(80), np.tanh(difference / difference.std())], axis=1)
    # scikit-learn's objective is C sum(loss) + |w|^2 / 2, ours sum(loss) + 0.01 |w|^2 / 2.
    other = LogisticRegression(C=100.0, fit_intercept=False, tol=1e-10, max_iter=1000).fit(
        features, preferred
    )
    expected = other.predict_proba([[1.0, 0.0]])[0, 1]
    assert length_controlled(preferred, difference, resamples=1).value == pytest.approx(expected, abs=1e-6)


def test_separable_preferences_give_a_finite_figure():
    """The longer reply always wins, and both are longer as often: nothing is left at equal length."""
    difference = np.array([-30.0, -20.0, -10.0, 10.0, 20.0, 30.0] * 10)
    figure = length_controlled((difference > 0).astype(float), difference, resamples=50)
    assert figure.value == pytest.approx(0.5, abs=1e-6)
    assert 0 < figure.low <= figure.high < 1


def test_without_a_spread_of_lengths_nothing_can_be_controlled():
    assert math.isnan(length_controlled([1.0, 0.0, 1.0], [5.0, 5.0, 5.0]).value)
    assert length_controlled([1.0, 0.0, 1.0], [0.0, 0.0, 0.0]).value == pytest.approx(2 / 3)
    assert length_controlled([], []).n == 0


def test_win_figures_measure_length_in_characters_of_the_second_less_the_first():
    before, after = ["a", "aaa", "aa", "aaaa"], ["aaa", "a", "aaaaa", "aaaa"]
    found = win_figures("judge", [1.0, 0.0, 1.0, 0.5], before, after, resamples=20)
    assert found["judge/win_rate"].value == pytest.approx(0.625)
    assert found["judge/ties"].value == pytest.approx(0.25)
    expected = length_controlled([1.0, 0.0, 1.0, 0.5], [2, -2, 3, 0], resamples=20)
    assert found["judge/win_rate_equal_length"] == expected
