"""Soft weights: by hand, their mean, what they leave out, and the scores they cannot take."""

import math

import pytest
import torch

from tests.selection.test_selectors import scored
from tokenward.errors import UserError
from tokenward.plugins import build
from tokenward.selection import SELECTORS, SoftWeights

NAN = math.nan
PAIR = scored([1.0, 2.0, 1.0], [3.0, 1.0])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # Shares 1/4, 1/2, 1/4 of three tokens and 3/4, 1/4 of two.
        ({}, [0.75, 1.5, 0.75, 1.5, 0.5]),
        ({"transform": "power", "power": 2.0}, [0.5, 2.0, 0.5, 1.8, 0.2]),
        # e^(3/2) : e^(1/2) is sigma(1) = 0.7310586
        ({"transform": "exp", "temperature": 2.0}, [0.8222059, 1.3555883, 0.8222059, 1.4621172, 0.5378828]),
        ({"uniform": 0.4}, [0.85, 1.3, 0.85, 1.3, 0.7]),
        ({"uniform": 1.0}, [1.0] * 5),
        ({"eos": "none"}, [2 / 3, 4 / 3, 0.0, 1.0, 0.0]),
        ({"eos": "chosen"}, [0.75, 1.5, 0.75, 1.0, 0.0]),
        ({"eos": "rejected"}, [2 / 3, 4 / 3, 0.0, 1.5, 0.5]),
        # Means 4/3 and 2 over their mean 5/3.
        ({"spread": "sequence"}, [0.8] * 3 + [1.2] * 2),
        ({"spread": "sequence", "uniform": 0.5}, [0.9] * 3 + [1.1] * 2),
        # Without the ends 1.5 and 3, over 2.25.
        ({"spread": "sequence", "eos": "none"}, [2 / 3, 2 / 3, 0.0, 4 / 3, 0.0]),
        # exp(4/3) and exp(2) over their mean: 2 sigma(-2/3) and 2 sigma(2/3).
        ({"spread": "sequence", "transform": "exp"}, [0.6784873] * 3 + [1.3215127] * 2),
    ],
)
def test_by_hand(settings, expected):
    weights = SoftWeights(**settings)(PAIR)
    assert weights.tolist() == pytest.approx(expected, abs=1e-6)
    assert weights.dtype == torch.float32


@pytest.mark.parametrize(
    "settings", [{}, {"transform": "exp"}, {"transform": "power", "power": -1.0}, {"eos": "none"}]
)
def test_weights_average_one_over_the_eligible_tokens_of_each_response(settings):
    tokens = scored([0.3, NAN, 1.7, 0.9], [5.0, 0.2, 0.1], [2.0, 0.4], [1.0, NAN])
    weights = SoftWeights(**settings)(tokens)
    eligible = ~tokens.scores.isnan() & ~(tokens.eos & (settings.get("eos") == "none"))
    assert not weights[~eligible].any()
    for response in range(4):
        assert weights[(tokens.response == response) & eligible].mean().item() == pytest.approx(1.0, abs=1e-6)
    alone = SoftWeights(**settings)(scored([0.3, NAN, 1.7, 0.9]))
    assert weights[:4].tolist() == alone.tolist()


def test_only_ratios_of_rewards_matter_and_only_differences_under_exp():
    tokens = scored([0.25, 0.5, 1.0], [2.0, 4.0])
    larger, higher = (tokens._replace(scores=scores) for scores in (8 * tokens.scores, tokens.scores + 1000))
    assert SoftWeights()(larger).tolist() == pytest.approx(SoftWeights()(tokens).tolist(), abs=1e-6)
    soft = SoftWeights(transform="exp")
    assert soft(higher).tolist() == pytest.approx(soft(tokens).tolist(), abs=1e-5)


@pytest.mark.parametrize("spread", ["token", "sequence"])
def test_a_response_without_a_score_gets_no_weight(spread):
    weights = SoftWeights(spread=spread)(scored([NAN, NAN], [2.0, 2.0]))
    assert weights.tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("transform", ["identity", "power"])
@pytest.mark.parametrize("score", [0.0, -0.25])
def test_scores_that_are_not_positive_are_refused(transform, score):
    tokens = scored([1.0, 2.0, score], [1.0, 2.0])
    with pytest.raises(UserError, match=f"{score:.4g}") as caught:
        SoftWeights(transform=transform)(tokens)
    assert caught.value.code == "nonpositive-scores"
    assert SoftWeights(transform="exp")(tokens).isfinite().all()
    # Unless they are left out.
    assert SoftWeights(transform=transform, eos="none")(scored([1.0, score], [2.0, score])).tolist() == [
        1.0, 0.0, 1.0, 0.0
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"temperature": 0.0}, "out-of-range"),
        ({"uniform": 1.5}, "out-of-range"),
        ({"transform": "log"}, "invalid-setting"),
        ({"temprature": 1.0}, "unknown-setting"),
    ],
)
def test_impossible_settings_are_refused(settings, code):
    with pytest.raises(UserError) as caught:
        build("selection", "soft", settings, SELECTORS)
    assert caught.value.code == code
