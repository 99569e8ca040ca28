"""Do two scorings select the same tokens?"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score, jaccard_score

from tokenward.errors import UserError
from tokenward.evaluation.credit import jaccard, kappa, selected, stability_figures


def test_overlap_by_hand():
    one, other = [True, True, False, False], [True, False, True, False]
    # One of three in common; they agree on half, as two random halves would.
    assert jaccard(one, other) == 1 / 3
    assert kappa(one, other) == 0.0
    assert kappa(one, one) == jaccard(one, one) == 1.0
    assert kappa(one, [False, False, True, True]) == -1.0
    assert jaccard(one, [False, False, True, True]) == 0.0


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=30))
@settings(max_examples=100, deadline=None)
def test_overlap_equals_sklearn(items):
    one, other = (np.array(column) for column in zip(*items, strict=True))
    if (one | other).any():
        assert jaccard(one, other) == pytest.approx(jaccard_score(one, other), abs=1e-12)
    if len({*one.tolist(), *other.tolist()}) == 2:
        assert kappa(one, other) == pytest.approx(cohen_kappa_score(one, other), abs=1e-12)


def test_where_nothing_was_chosen_there_is_no_overlap():
    assert math.isnan(jaccard([False, False], [False, False]))
    for same in ([True, True], [False, False], []):
        assert math.isnan(kappa(same, same))


def test_selected_is_the_best_or_worst_share_the_earliest_of_a_tie():
    scores = [0.1, 0.9, 0.9, -1.0, 0.5, 0.2, 0.3]
    assert np.flatnonzero(selected(scores, 0.3, top=True)).tolist() == [1, 2]
    assert np.flatnonzero(selected(scores, 0.3, top=False)).tolist() == [0, 3]
    assert np.flatnonzero(selected([2.0, 2.0, 2.0], 0.34, top=True)).tolist() == [0]
    assert np.flatnonzero(selected([1.0, 2.0], 0.1, top=True)).tolist() == [1], "at least one"


def scorings(count: int, noise: float, seed: int = 0):
    """Scores of responses, and the same with noise."""
    rng = np.random.default_rng(seed)
    first = {f"{i}": rng.normal(size=20).tolist() for i in range(count)}
    return first, {
        key: (np.array(values) + noise * rng.normal(size=20)).tolist() for key, values in first.items()
    }


def test_the_same_scores_overlap_fully_whatever_their_scale():
    first, _ = scorings(20, 0.0)
    scaled = {key: [3 * value + 1 for value in values] for key, values in first.items()}
    for name, figure in stability_figures(first, scaled, fraction=0.3, resamples=50).items():
        assert figure == (1.0, 1.0, 1.0, 20), name


def test_unrelated_scores_are_at_chance_and_noise_lies_between():
    first, near = scorings(300, 0.5)
    _, other = scorings(300, 0.0, seed=1)
    unrelated = stability_figures(first, {**other, "extra": [1.0]}, fraction=0.3, resamples=200)
    noisy = stability_figures(first, near, fraction=0.3, resamples=200)
    for side in ("top", "bottom"):
        assert unrelated[f"kappa/{side}"].value == pytest.approx(0.0, abs=0.05)
        # Six of twenty: 1.8 in common by chance, of 10.2 in either.
        assert unrelated[f"jaccard/{side}"].value == pytest.approx(1.8 / 10.2, abs=0.03)
        assert 0.4 < noisy[f"kappa/{side}"].low < noisy[f"kappa/{side}"].high < 0.9
        assert unrelated[f"kappa/{side}"].n == 300


def test_top_and_bottom_are_told_apart():
    first = {"a": [3.0, 2.0, 1.0, 0.0, -1.0, -2.0]}
    second = {"a": [3.0, 2.0, 1.0, 0.0, -2.0, 5.0]}
    figures = stability_figures(first, second, fraction=0.34, resamples=10)
    assert figures["jaccard/top"].value == 1 / 3  # 3, 2 and 5, 3
    assert figures["jaccard/bottom"].value == 1 / 3  # -2, -1 and -2, 0


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(UserError, match="no response in common"):
        stability_figures({"a": [1.0]}, {"b": [1.0], "c": [1.0]}, fraction=0.3)
    with pytest.raises(UserError, match="1 tokens in one scoring"):
        stability_figures({"a": [1.0]}, {"a": [1.0, 2.0]}, fraction=0.3)
