"""The selector of steps: sides, scopes, end-of-turn tokens, signs, and published weights by hand."""

import pytest
import torch

from tests.selection.test_selectors import scored
from tokenward.config import Named
from tokenward.errors import UserError
from tokenward.scoring.steps import STEPS
from tokenward.selection import Threshold, is_signed, scope_of, selector_of, unit_of

NAN = float("nan")


def transform(**settings):
    return selector_of(Named(name="transform", arguments=settings), seed=0)


def weights(tokens, **settings) -> list[float]:
    return transform(**settings)(tokens).tolist()


PAIR = scored([1.0, -2.0, 0.5], [1.0, -2.0, 0.5])


def test_tgdpo_weighs_one_plus_and_one_minus_alpha_times_the_reward():
    """arXiv 2506.14574: f_w = 1 + alpha r, f_l = 1 - alpha r, alpha 0.5."""
    made = transform(
        chosen=[{"affine": {"scale": 0.5, "shift": 1.0}}],
        rejected=[{"affine": {"scale": -0.5, "shift": 1.0}}],
        signed=True,
    )
    assert made(PAIR).tolist() == [1.5, 0.0, 1.25, 0.5, 2.0, 0.75]
    assert is_signed(made)


def test_tis_dpo_clamps_and_takes_the_exponential():
    """arXiv 2410.04350, Eq. 19: k exp(mu clamp(s, L, U)), mu = 1 and -1; here L = -1, U = 0.75, k = 2."""
    clamp = {"clamp": {"low": -1.0, "high": 0.75}}
    double = {"affine": {"scale": 2.0}}
    found = weights(
        PAIR, chosen=[clamp, "exp", double], rejected=[clamp, {"exp": {"temperature": -1}}, double]
    )
    expected = [2 * torch.tensor(x).exp().item() for x in (0.75, -1.0, 0.5, -0.75, 1.0, -0.5)]
    assert found == pytest.approx(expected)


def test_confpo_keeps_what_is_less_likely_than_the_mean():
    """arXiv 2506.08712: probability below the arithmetic mean of the response's probabilities, 0.5 here."""
    tokens = scored([0.9, 0.5, 0.1, 0.5], [0.2, 0.8])
    assert weights(tokens, steps=[{"threshold": {"at": "mean", "keep": "below"}}]) == [0, 0, 1, 0, 1, 0]


def test_toss_drops_a_share_of_all_tokens():
    """arXiv 2603.01185: the highest share of the whole data, a fifth here, is dropped; each side by itself."""
    tokens = scored([1.0, 9.0, 8.0], [5.0, 6.0], [2.0, 3.0], [4.0, 7.0, 1.0])
    step = {"top": {"fraction": 0.8, "which": "smallest", "scope": "dataset"}}
    # Of the preferred side's 1 9 8 2 3 the 9 goes, of the other side's 5 6 4 7 1 the 7.
    assert weights(tokens, steps=[step]) == [1, 0, 1, 1, 1, 1, 1, 1, 0, 1]
    assert scope_of(transform(steps=[step])) == "dataset"


def test_scopes_differ_where_they_should():
    tokens = scored([0.0, 1.0], [9.0, 9.0], [4.0, 5.0], [9.0, 9.0], comparisons=[0, 0, 1, 1])
    mean = {"at": "mean", "keep": "above"}
    assert weights(tokens, steps=[{"threshold": mean}])[:2] == [0, 1]
    assert weights(tokens, steps=[{"threshold": {**mean, "scope": "dataset"}}]) == [0, 0, 1, 1, 1, 1, 1, 1]


def test_a_comparison_with_several_rejected_responses_is_one_group():
    tokens = scored([0.0], [1.0, 2.0], [3.0], ranks=[0, 1, 2], comparisons=[0, 0, 0], closed=False)
    cut = {"threshold": {"at": "mean", "keep": "above", "scope": "comparison"}}
    assert weights(tokens, steps=[cut]) == [1, 0, 1, 1]  # of 1, 2 and 3 the mean is 2


def test_tokens_that_are_not_eligible_are_in_no_statistic():
    tokens = scored([1.0, NAN, 3.0, 100.0], [1.0, 3.0, 100.0])
    cut = [{"threshold": {"at": "mean", "keep": "above"}}]
    # Without the ends, which are last: the mean of 1 and 3 is 2.
    assert weights(tokens, steps=cut, eos="none") == [0, 0, 1, 0, 0, 1, 0]
    assert weights(tokens, steps=cut, eos="chosen") == [0, 0, 0, 1, 0, 1, 0]


def test_steps_are_applied_in_order_and_give_no_score_to_a_token_without_one(monkeypatch):
    assert weights(PAIR, steps=["relu", {"affine": {"shift": 1.0}}])[:3] == [2.0, 1.0, 1.5]
    assert weights(PAIR, steps=[{"affine": {"shift": 1.0}}, "relu"])[:3] == [2.0, 0.0, 1.5]
    monkeypatch.setitem(STEPS, "fill", lambda scores, owners: scores.nan_to_num(5.0))
    assert weights(scored([NAN, 1.0], [NAN]), steps=["fill"]) == [0, 1, 0]
    monkeypatch.setitem(STEPS, "short", lambda scores, owners: scores[:1])
    with pytest.raises(UserError, match="short") as caught:
        weights(PAIR, steps=["short"])
    assert caught.value.code == "wrong-result"


def test_segments_are_pooled_per_side():
    pool = transform(steps=[{"segment_pool": {"segment": "word", "how": "sum", "place": "end"}}], signed=True)
    assert unit_of(pool) == "word"
    tokens = PAIR._replace(segment=torch.tensor([0, 0, 1, 2, 3, 3]))
    assert pool(tokens).tolist() == [0.0, -1.0, 0.5, 1.0, 0.0, -1.5]
    with pytest.raises(UserError, match="word") as caught:
        pool(PAIR)
    assert caught.value.code == "missing-segments"


@pytest.mark.parametrize(
    ("steps", "code"),
    [
        (["expp"], "unknown-name"),
        ([{"affine": {"scael": 1}}], "unknown-setting"),
        ([{"affine": {}, "exp": {}}], "invalid-value"),
        ([{"affine": 2}], "invalid-value"),
        ([{"clamp": {"low": 2, "high": 1}}], "invalid-value"),
        ([{"clamp": {}}], "invalid-value"),
        ([{"exp": {"temperature": 0}}], "invalid-value"),
        ([{"decay": {"rate": 0}}], "invalid-value"),
        ([{"threshold": {"at": "quantile"}}], "missing-setting"),
        ([{"threshold": {"at": "quantile", "value": 60}}], "invalid-value"),
        ([{"threshold": {"at": "otsu", "classes": 3, "cut": 2}}], "invalid-value"),
        ([{"cluster": {"classes": 3, "keep": [3]}}], "invalid-value"),
        ([{"top": {"fraction": 0}}], "invalid-value"),
        ([{"beyond_shorter": {"scope": "dataset"}}], "unknown-setting"),
        ([{"top": {"scope": "batch"}}, {"top": {"scope": "dataset"}}], "conflicting-settings"),
        ([{"top": {"scope": "batch"}}, "segment_pool"], "conflicting-settings"),
        ([{"segment_pool": {"segment": "word"}}, "segment_pool"], "conflicting-settings"),
    ],
)
def test_impossible_steps_are_refused_when_the_selector_is_built(steps, code):
    with pytest.raises(UserError) as caught:
        transform(steps=steps)
    assert caught.value.code == code


def test_the_threshold_selector_cuts_at_a_statistic_of_the_scores():
    tokens = scored([1.0, 2.0, 9.0], [1.0, 2.0, 9.0])
    assert Threshold(at="mean")(tokens).tolist() == [0, 0, 1, 1, 1, 0]
    assert Threshold(at="median")(tokens).tolist() == [0, 1, 1, 1, 0, 0]
    # A share of 0.9 keeps the top tenth of the preferred side and the lowest tenth of the other.
    assert Threshold(at="quantile", quantile=0.9)(tokens).tolist() == [0, 0, 1, 1, 0, 0]
    assert Threshold(at="otsu")(tokens).tolist() == [0, 0, 1, 1, 1, 0]
    four = scored([1.0, 2.0], [1.0, 2.0], [5.0, 6.0], [5.0, 6.0])
    assert Threshold(at="mean", scope="dataset")(four).tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
