"""Sums of objectives, and the settings that every objective refuses."""

import math

import pytest

from tests.objectives.test_pairs import LOGP, double, loss_of, pair
from tokenward.errors import UserError
from tokenward.objectives import DPO, OBJECTIVES, Sum, TReg
from tokenward.plugins import build

# Chosen tokens above 0, rejected ones below.
SPEAKING = {"name": "threshold", "above": 0.0, "below": 0.0}


def test_a_sum_is_the_weighted_sum_of_its_terms():
    terms = [
        {"name": "dpo", "beta": 0.2},
        {"name": "treg", "beta": 0.2, "factor": 0.25, "selection": SPEAKING},
    ]
    losses = Sum(terms=terms)(double(*LOGP), pair(scores=[0.2, -0.1, -0.3, 0.1, -0.4]))
    parts = [loss_of(DPO(beta=0.2)), loss_of(TReg(beta=0.2), pair([1.0, 0.0, 1.0, 0.0, 1.0]))]
    assert losses.loss.item() == pytest.approx(parts[0] + 0.25 * parts[1], abs=1e-9)
    assert losses.metrics["loss/dpo"].item() == pytest.approx(parts[0])
    assert losses.metrics["loss/treg"].item() == pytest.approx(parts[1])
    # The first term's value of a metric that both have.
    assert losses.metrics["rewards/chosen"].item() == pytest.approx(0.2)
    assert losses.metrics["selection/empty"].tolist() == [0.0]


def test_a_sum_of_one_term_keeps_its_denominator():
    whole = Sum(terms=[{"name": "weighted_likelihood", "normaliser": "step_length", "factor": 0.5}])
    found = whole(double(*LOGP), pair())
    assert whole.needs.own_denominator
    # Half of the chosen response's 1 + 2, and its two tokens.
    assert (found.loss.tolist(), found.denominator.tolist()) == ([1.5], [2.0])


def test_a_random_selection_in_a_term_draws_the_same_every_time():
    terms = [{"name": "sepo", "selection": {"name": "top_fraction", "ties": "random"}}]
    batch = pair(scores=[0.0] * 5)
    assert len({loss_of(Sum(terms=terms), batch) for _ in range(3)}) == 1


def test_both_names_of_the_likelihood():
    assert build("objective", "sft", {}, OBJECTIVES) == build(
        "objective", "weighted_likelihood", {}, OBJECTIVES
    )


@pytest.mark.parametrize(
    ("name", "settings", "code"),
    [
        *[(name, {"beta": 0.0}, "out-of-range") for name in ("dpo", "ipo", "orpo", "pairwise", "simpo", "tdpo", "treg")],
        ("dpo", {"beta": math.nan}, "out-of-range"),
        ("dpo", {"label_smoothing": 0.5}, "out-of-range"),
        ("dpo", {"label_smoothing": -0.1}, "out-of-range"),
        ("dpo", {"loss": "ipo", "label_smoothing": 0.1}, "conflicting-settings"),
        ("sepo", {"gamma": -1.0}, "out-of-range"),
        ("sepo", {"normaliser": "rate"}, "missing-setting"),
        ("sepo", {"normaliser": "rate", "chosen_rate": 0.3, "rejected_rate": 1.2}, "missing-setting"),
        ("sepo", {"profile": "official", "gamma": 2.5}, "conflicting-settings"),
        ("sepo", {"profile": "official", "margin": 0.1}, "conflicting-settings"),
        ("sepo", {"profile": "official", "normaliser": "length"}, "conflicting-settings"),
        ("pairwise", {"link": "odds"}, "conflicting-settings"),
        ("pairwise", {"link": "ipo", "margin": 0.1}, "conflicting-settings"),
        ("tdpo", {"version": 1, "alpha": 0.3}, "conflicting-settings"),
        ("tdpo", {"profile": "official", "version": 2}, "conflicting-settings"),
        ("tbpo", {"profile": "official"}, "conflicting-settings"),
        ("tbpo", {"power": -1.0}, "out-of-range"),
        ("sparsepo", {"l1_kl": -0.1}, "out-of-range"),
        ("kto", {"desirable": 0.0, "undesirable": 0.0}, "out-of-range"),
        ("token_kl", {"stop_gradient": "chosen"}, "conflicting-settings"),
        ("reinforce", {"entropy": -0.1}, "out-of-range"),
        ("reinforce", {"kl": math.nan}, "out-of-range"),
        ("reinforce", {"discount": 1.1, "return_to_go": True}, "out-of-range"),
        ("reinforce", {"discount": 0.9}, "conflicting-settings"),
        ("reinforce", {"baseline": "median"}, "invalid-setting"),
        ("plackett_luce", {"aggregate": "avrage"}, "unknown-name"),
        ("plackett_luce", {"aggregate": "tokenward.ops.aggregates:nothing"}, "import-failed"),
        ("plackett_luce", {"aggregate": "math:sqrt"}, "not-a-plugin"),
        ("plackett_luce", {"aggregate": "math:pi"}, "not-a-plugin"),
        ("plackett_luce", {"temperature": 0.0}, "out-of-range"),
        ("plackett_luce", {"list_temperature": -1.0}, "out-of-range"),
        ("plackett_luce", {"length_neutral": True}, "conflicting-settings"),
        ("plackett_luce", {"group_size": 1}, "out-of-range"),
        ("plackett_luce", {"groups": 0}, "out-of-range"),
        ("sum", {"terms": []}, "missing-setting"),
        ("sum", {"terms": [{"factor": 2.0}]}, "invalid-value"),
        ("sum", {"terms": [{"name": "dpo", "factor": "much"}]}, "invalid-value"),
        ("sum", {"terms": [{"name": "dpo", "selection": "all"}]}, "invalid-value"),
        ("sum", {"terms": [{"name": "dppo"}]}, "unknown-name"),
        ("sum", {"terms": [{"name": "dpo"}, {"name": "sft", "normaliser": "step_weights"}]}, "conflicting-settings"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(name, settings, code):
    with pytest.raises(UserError) as caught:
        build("objective", name, settings, OBJECTIVES)
    assert caught.value.code == code
