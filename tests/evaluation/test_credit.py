"""Do scores find the tokens of known value?"""

import numpy as np
import pytest

from tokenward.evaluation.credit import KnownResponse, credit_figures

KINDS = ("auroc", "auroc_raising", "auroc_lowering", "precision_raising", "precision_lowering")


def test_figures_by_hand():
    responses = [
        KnownResponse([2.0, 0.0, 0.0, -1.0], {"x": [3.0, 1.0, 2.0, 1.5]}),
        KnownResponse([0.0, 1.0, 0.0], {"x": [0.0, 1.5, 4.0]}),
    ]
    figures = credit_figures(responses, resamples=50)
    values = {name: figure.value for name, figure in figures.items()}
    # Neutral tokens: 1, 2, 0, 4. Raising: 3 beats 1, 2, 0; 1.5 beats 1, 0: 5 of 8.
    # Lowering: 1.5 lies below 2 and 4, above 1 and 0: 2 of 4.
    # Precision: raising finds 3 first in one response and 4 in the other; lowering takes 1 (neutral) first.
    assert values == pytest.approx(
        {
            "credit/auroc/x": (5 / 8 + 2 / 4) / 2,
            "credit/auroc_raising/x": 5 / 8,
            "credit/auroc_lowering/x": 2 / 4,
            "credit/precision_raising/x": (1 + 0) / 2,
            "credit/precision_lowering/x": 0.0,
        }
    )
    assert {name: figure.n for name, figure in figures.items()} == {
        "credit/auroc/x": 2,
        "credit/auroc_raising/x": 2,
        "credit/auroc_lowering/x": 2,
        "credit/precision_raising/x": 2,
        "credit/precision_lowering/x": 1,  # one response has a lowering token
    }


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


def test_scale_and_order_of_responses_change_nothing_but_the_draws():
    responses = known(30)
    scaled = [KnownResponse(item.values, {"random": 3 * item.scores["random"] + 7}) for item in responses]
    plain = [KnownResponse(item.values, {"random": item.scores["random"]}) for item in responses]
    assert credit_figures(scaled, resamples=50) == credit_figures(plain, resamples=50)
    turned = credit_figures(plain[::-1], resamples=50)
    for name, figure in credit_figures(plain, resamples=50).items():
        assert turned[name].value == pytest.approx(figure.value, abs=1e-12), name


def test_without_responses_there_are_no_figures():
    assert credit_figures([]) == {}
