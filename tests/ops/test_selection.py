"""How many tokens a fraction keeps, and which."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenward.ops.selection import best_places, kept_count, pooled_scores, top_count, top_fraction

LENGTHS = torch.arange(1, 2049)
# Few different values make ties common; -inf is a valid score, NaN is none.
numbers = st.sampled_from([-torch.inf, -2.0, -0.5, 0.0, 0.5, 1.0, 3.0, torch.inf, torch.nan])
tokens = st.lists(st.tuples(numbers, st.integers(0, 3)), min_size=1, max_size=30)
fractions = st.sampled_from([0.01, 0.1, 0.3, 1 / 3, 0.5, 0.7, 0.95, 1.0])
exactly = settings(derandomize=True, deadline=None, max_examples=50)


def split(tokens):
    return torch.tensor([token[0] for token in tokens]), torch.tensor([token[1] for token in tokens])


def best_by_sorting(tokens, group: int, count: int) -> set[int]:
    """The first ``count`` of a stable descending sort of one group's scored tokens."""
    members = [i for i, (score, owner) in enumerate(tokens) if owner == group and score == score]
    return set(sorted(members, key=lambda i: -tokens[i][0])[:count])


def kept_set(kept: torch.Tensor) -> set[int]:
    return set(kept.nonzero()[:, 0].tolist())


def top(scores, count: int) -> set[int]:
    scores = torch.as_tensor(scores)
    return kept_set(top_count(scores, torch.zeros(len(scores)).long(), torch.tensor([count])))


@pytest.mark.parametrize("fraction", ["0.1", "0.3", "0.5", "0.7", "0.9", "0.35", "1.0"])
def test_counts_are_exact_and_the_float_rule_is_the_published_one(fraction):
    exact = [int(Fraction(fraction) * n) for n in LENGTHS.tolist()]
    published = [int(float(fraction) * n) for n in LENGTHS.tolist()]
    assert kept_count(LENGTHS, float(fraction), rule="floor", minimum=0).tolist() == exact
    assert kept_count(LENGTHS, float(fraction), rule="float", minimum=0).tolist() == published
    if fraction == "0.7":
        lengths = [
            n for n, one, other in zip(LENGTHS.tolist(), exact, published, strict=True) if one != other
        ]
        assert (lengths[:3], len(lengths)) == ([90, 170, 180], 34)


@pytest.mark.parametrize(
    ("totals", "fraction", "rule", "minimum", "expected"),
    [
        # 0.5 x 3 = 1.5, 0.5 x 5 = 2.5, 0.5 x 4 = 2
        ([3, 5, 4], 0.5, "floor", 0, [1, 2, 2]),
        ([3, 5, 4], 0.5, "round", 0, [2, 3, 2]),
        ([3, 5, 4], 0.5, "ceil", 0, [2, 3, 2]),
        # 0.1 x 11 = 1.1, and 0.1 x 10 is exactly 1
        ([11, 10], 0.1, "ceil", 0, [2, 1]),
        ([3, 3000], 1 / 3, "floor", 0, [1, 1000]),
        # The tokens of a whole data set do not overflow.
        ([10**9], 1 / 3, "floor", 0, [10**9 // 3]),
        ([10**9], 1 / 3, "ceil", 0, [10**9 // 3 + 1]),
        ([0, 1, 2, 5, 50], 0.1, "floor", 3, [0, 1, 2, 3, 5]),
        ([0, 1, 2, 5, 50], 0.1, "float", 0, [0, 0, 0, 0, 5]),
    ],
)
def test_counts_by_hand(totals, fraction, rule, minimum, expected):
    assert kept_count(torch.tensor(totals), fraction, rule=rule, minimum=minimum).tolist() == expected


@given(tokens, st.lists(st.integers(0, 8), min_size=4, max_size=4))
@exactly
def test_top_count_is_a_stable_sort(tokens, counts):
    kept = kept_set(top_count(*split(tokens), torch.tensor(counts)))
    assert kept == set().union(*(best_by_sorting(tokens, group, counts[group]) for group in range(4)))


@given(tokens, fractions)
@exactly
def test_top_fraction_is_a_stable_sort(tokens, fraction):
    exact = Fraction(fraction).limit_denominator(1000)
    expected = set()
    for group in range(4):
        scored = sum(1 for score, owner in tokens if owner == group and score == score)
        expected |= best_by_sorting(tokens, group, max(int(exact * scored), 1))
    assert kept_set(top_fraction(*split(tokens), 4, fraction)) == expected


@given(tokens, fractions, fractions)
@exactly
def test_smaller_fraction_is_a_subset_and_everything_is_every_scored_token(tokens, one, other):
    smaller, larger = (kept_set(top_fraction(*split(tokens), 4, share)) for share in sorted((one, other)))
    scores, group = split(tokens)
    assert smaller <= larger <= kept_set(top_fraction(scores, group, 4, 1.0)) == kept_set(~scores.isnan())


@given(
    st.lists(st.tuples(st.integers(-40, 40), st.integers(0, 3)), min_size=1, max_size=30),
    st.sampled_from([0.25, 0.5, 1.0, 3.0, 1024.0]),
    st.integers(-1000, 1000),
    fractions,
)
@exactly
def test_positive_scale_and_shift_change_nothing(tokens, scale, shift, fraction):
    # Small integers times these scales are exact in float32, so ties stay ties.
    scores, group = split(tokens)
    plain = top_fraction(scores.float(), group, 4, fraction)
    assert top_fraction(scale * scores.float() + shift, group, 4, fraction).tolist() == plain.tolist()


def test_earliest_wins_a_tie():
    assert top([1.0, 2.0, 1.0, 2.0, 1.0], 1) == {1}
    assert top([1.0, 2.0, 1.0, 2.0, 1.0], 3) == {0, 1, 3}
    assert top([0.0, -0.0], 1) == {0}
    # An unstable sort keeps short inputs in order by luck, so here are very many ties.
    scores = (torch.arange(3000) * 7919 % 3).float()
    best = (scores == 2).nonzero()[:, 0]
    assert top(scores, 500) == set(best[:500].tolist())
    half_each = top_count(scores, torch.arange(3000) // 1500, torch.tensor([400, 400]))
    expected = set(best[best < 1500][:400].tolist()) | set(best[best >= 1500][:400].tolist())
    assert kept_set(half_each) == expected


def test_nan_is_never_kept_and_groups_need_not_be_contiguous():
    scores = [torch.nan, -torch.inf, torch.nan, -torch.inf]
    assert (top(scores, 1), top(scores, 4)) == ({1}, {1, 3})
    assert kept_set(top_fraction(torch.full((4,), torch.nan), torch.zeros(4).long(), 1, 1.0)) == set()
    scores, group = torch.tensor([1.0, 9.0, 2.0, 8.0, 3.0, 7.0]), torch.tensor([2, 0, 2, 0, 2, 0])
    # Group 0 has 9, 8, 7; group 1 nothing; group 2 has 1, 2, 3.
    assert kept_set(top_count(scores, group, torch.tensor([1, 5, 2]))) == {1, 2, 4}


def test_pooled_scores_by_hand():
    """Owner 0 has 1, 4 and NaN, owner 1 only NaN, owner 2 a single -2, owner 3 no token."""
    scores = torch.tensor([1.0, torch.nan, -2.0, 4.0, torch.nan])
    owner = torch.tensor([0, 0, 2, 0, 1])
    for how, expected in (("largest", 4.0), ("smallest", 1.0), ("mean", 2.5), ("sum", 5.0)):
        found = pooled_scores(scores, owner, 4, how=how).tolist()
        assert found == pytest.approx([expected, torch.nan, -2.0, torch.nan], nan_ok=True), how


def test_best_places():
    scores = torch.tensor([2.0, torch.nan, 5.0, -torch.inf, 2.0, 3.0])
    assert best_places(scores, 4).tolist() == [2, 5, 0, 4]
    assert best_places(scores, 9).tolist() == [2, 5, 0, 4, 3], "-inf is a score, NaN is none"
    assert best_places(scores[1:2], 1).tolist() == []
