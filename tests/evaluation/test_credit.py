"""Do scores find the tokens of known value, and do two scorings select the same tokens?"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score, jaccard_score

from tokenward.errors import UserError
from tokenward.evaluation.credit import (
    KnownResponse,
    credit_figures,
    jaccard,
    kappa,
    known_response,
    repeated_credit_figures,
    selected,
    stability_figures,
)
from tokenward.tokens.spans import ByteSpan
from tokenward.types import Span

KINDS = (
    "auroc", "auroc_raising", "auroc_lowering", "precision_raising", "precision_lowering",
)  # fmt: skip


def test_figures_by_hand():
    responses = [
        KnownResponse([2.0, 0.0, 0.0, -1.0], {"x": [3.0, 1.0, 2.0, 1.5]}),
        KnownResponse([0.0, 1.0, 0.0], {"x": [0.0, 1.5, 4.0]}),
    ]
    figures = credit_figures(responses, at=[2], resamples=50)
    values = {name: figure.value for name, figure in figures.items()}
    # Neutral tokens: 1, 2, 0, 4. Raising: 3 beats 1, 2, 0; 1.5 beats 1, 0: 5 of 8.
    # Lowering: 1.5 lies below 2 and 4, above 1 and 0: 2 of 4.
    # Precision: raising finds 3 first in one response and 4 in the other; lowering takes 1 (neutral) first.
    # Average precision: raising finds its two at 3 (1 of 2) and 1.5 (2 of 4) in 4, 3, 2, 1.5, 1, 0; lowering
    # finds its one at 1.5, the third of 0, 1, 1.5, 2, 4.
    # At 2: 3 and 2, then 4 and 1.5; lowering 1 and 1.5.
    assert values == pytest.approx(
        {
            "credit/auroc/x": (5 / 8 + 2 / 4) / 2,
            "credit/auroc_raising/x": 5 / 8,
            "credit/auroc_lowering/x": 2 / 4,
            "credit/average_precision/x": (1 / 2 + 1 / 3) / 2,
            "credit/average_precision_raising/x": (1 / 2 + 2 / 4) / 2,
            "credit/average_precision_lowering/x": 1 / 3,
            "credit/precision_raising/x": (1 + 0) / 2,
            "credit/precision_lowering/x": 0.0,
            "credit/precision_at_2_raising/x": (1 / 2 + 1 / 2) / 2,
            "credit/precision_at_2_lowering/x": 1 / 2,
        }
    )
    assert {name for name, figure in figures.items() if figure.n == 1} == {
        "credit/precision_lowering/x",  # one response has a lowering token
        "credit/precision_at_2_lowering/x",
    }
    assert {figure.n for figure in figures.values()} == {1, 2}


def known(count: int, seed: int = 0) -> list[KnownResponse]:
    """Responses with far more raising than lowering tokens, scored by four scorers."""
    rng = np.random.default_rng(seed)
    responses = []
    for _ in range(count):
        values = rng.choice([0.0, 1.5, -2.0], p=[0.75, 0.2, 0.05], size=30)
        scores = {
            "perfect": values,
            "inverse": -values,
            "random": rng.random(30),
            "constant": np.ones(30),
            "only_raising": np.maximum(values, 0),
        }
        responses.append(KnownResponse(values, scores))
    return responses


@pytest.fixture(scope="module")
def figures():
    return credit_figures(known(200), resamples=200)


def test_a_perfect_scorer_has_1_and_its_opposite_0(figures):
    for kind in KINDS:
        assert figures[f"credit/{kind}/perfect"][:3] == (1.0, 1.0, 1.0), kind
        assert figures[f"credit/{kind}/inverse"].value == 0.0, kind


def test_random_scores_are_at_chance(figures):
    for kind in KINDS[:3]:
        figure = figures[f"credit/{kind}/random"]
        assert figure.value == pytest.approx(0.5, abs=0.05), kind  # three standard errors of lowering
        assert 0.02 < figure.high - figure.low < 0.1, kind


def test_constant_scores_are_exactly_at_chance(figures):
    for kind in KINDS[:3]:
        assert figures[f"credit/{kind}/constant"][:3] == (0.5, 0.5, 0.5), kind
    # Of a precision, chance is the share of such tokens in the response.
    shares = [
        np.mean(np.asarray(item.values) > 0) for item in known(200) if np.any(np.asarray(item.values) > 0)
    ]
    assert figures["credit/precision_raising/constant"].value == pytest.approx(np.mean(shares), abs=1e-12)


def test_both_directions_weigh_the_same_however_few_tokens_one_has(figures):
    """A scorer that is blind to lowering tokens is right half the time on them: (1 + 1/2) / 2."""
    assert figures["credit/auroc_lowering/only_raising"].value == pytest.approx(0.5, abs=1e-12)
    assert figures["credit/auroc/only_raising"].value == pytest.approx(0.75, abs=1e-12)


def test_average_precision_is_1_for_a_perfect_scorer_and_the_share_for_a_constant_one(figures):
    for side in ("raising", "lowering"):
        assert figures[f"credit/average_precision_{side}/perfect"][:3] == (1.0, 1.0, 1.0)
        assert figures[f"credit/average_precision_{side}/inverse"].value < 0.3
    values = np.concatenate([np.asarray(item.values) for item in known(200)])
    share = (values > 0).sum() / (values >= 0).sum()
    assert figures["credit/average_precision_raising/constant"].value == pytest.approx(share, abs=1e-12)


def test_repeats_are_averaged_and_do_not_count_as_more_responses():
    once, again = ([only(item, "random") for item in known(60, seed=3)] for _ in range(2))
    same = repeated_credit_figures([once, again], resamples=100)
    for name, figure in credit_figures(once, resamples=100).items():
        assert same[name] == pytest.approx(figure, abs=1e-12), name
    rng = np.random.default_rng(9)
    other = [item._replace(scores={"random": rng.random(30)}) for item in once]
    both, first, second = (
        repeated_credit_figures(repeats, at=[3], resamples=50) for repeats in ([once, other], [once], [other])
    )
    for name, figure in both.items():
        assert figure.value == pytest.approx((first[name].value + second[name].value) / 2, abs=1e-12), name
        assert figure.n == first[name].n, name


def only(item: KnownResponse, name: str) -> KnownResponse:
    return item._replace(scores={name: item.scores[name]})


def test_spans_reach_the_tokens_that_they_cover_and_the_end_of_turn_is_left_out():
    text = "zoë lied"
    tokens = [ByteSpan(0, 2), ByteSpan(2, 4), ByteSpan(4, 5), ByteSpan(5, 9), ByteSpan(9, 9)]
    found = known_response(text, [Span(4, 8, -1.0)], tokens, {"x": [1.0, 2.0, 3.0, 4.0, 5.0]})
    assert found == KnownResponse([0.0, 0.0, 0.0, -1.0], {"x": [1.0, 2.0, 3.0, 4.0]})


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


def test_what_cannot_be_compared_is_refused():
    for other, code in (({"b": [1.0]}, "nothing-in-common"), ({"a": [1.0, 2.0]}, "tokenizer-mismatch")):
        with pytest.raises(UserError) as error:
            stability_figures({"a": [1.0]}, other, fraction=0.3)
        assert error.value.code == code
