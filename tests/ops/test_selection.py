"""How many tokens a fraction keeps, and which."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenward.ops.selection import best_places, kept_count, pooled_scores, top_count, top_fraction

LENGTHS = torch.arange(1, 2049)
# Few different values, so that ties are common; -inf is a real score, NaN is none.
numbers = st.sampled_from([-torch.inf, -2.0, -0.5, 0.0, 0.5, 1.0, 3.0, torch.inf, torch.nan])
tokens = st.lists(st.tuples(numbers, st.integers(0, 3)), min_size=1, max_size=30)
fractions = st.sampled_from([0.01, 0.1, 0.3, 1 / 3, 0.5, 0.7, 0.95, 1.0])
exactly = settings(derandomize=True, deadline=None, max_examples=50)


def split(tokens):
    return torch.tensor([token[0] for token in tokens]), torch.tensor([token[1] for token in tokens])


def best_by_sorting(tokens, group: int, count: int) -> set[int]:
    """A stable sort of one group's scored tokens, highest first, cut at ``count``."""
    members = [i for i, (score, owner) in enumerate(tokens) if owner == group and score == score]
    return set(sorted(members, key=lambda i: -tokens[i][0])[:count])


def kept_set(kept: torch.Tensor) -> set[int]:
    return set(kept.nonzero()[:, 0].tolist())


def test_seven_tenths_of_ninety_are_sixty_three():
    assert int(0.7 * 90) == 62
    totals = torch.tensor([90, 170, 180, 10])
    assert kept_count(totals, 0.7, rule="floor", minimum=1).tolist() == [63, 119, 126, 7]
    assert kept_count(totals, 0.7, rule="float", minimum=1).tolist() == [62, 118, 125, 7]


@pytest.mark.parametrize(
    "fraction", ["0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9", "0.35", "1.0"]
)
def test_counts_are_exact_at_every_length(fraction):
    exact = [int(Fraction(fraction) * n) for n in LENGTHS.tolist()]
    assert kept_count(LENGTHS, float(fraction), rule="floor", minimum=0).tolist() == exact


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.7, 0.9, 0.35, 1.0])
def test_the_float_rule_is_that_of_the_published_code(fraction):
    published = [int(fraction * n) for n in LENGTHS.tolist()]
    assert kept_count(LENGTHS, fraction, rule="float", minimum=0).tolist() == published


def test_the_two_rules_differ_at_thirty_four_lengths():
    exact = kept_count(LENGTHS, 0.7, rule="floor", minimum=0)
    published = kept_count(LENGTHS, 0.7, rule="float", minimum=0)
    lengths = LENGTHS[exact != published].tolist()
    assert lengths[:3] == [90, 170, 180]
    assert len(lengths) == 34


def test_rounding_by_hand():
    # 0.5 x 3 = 1.5, 0.5 x 5 = 2.5, 0.5 x 4 = 2
    totals = torch.tensor([3, 5, 4])
    assert kept_count(totals, 0.5, rule="floor", minimum=0).tolist() == [1, 2, 2]
    assert kept_count(totals, 0.5, rule="round", minimum=0).tolist() == [2, 3, 2]
    assert kept_count(totals, 0.5, rule="ceil", minimum=0).tolist() == [2, 3, 2]
    # 0.1 x 11 = 1.1, and 0.1 x 10 is exactly 1
    assert kept_count(torch.tensor([11, 10]), 0.1, rule="ceil", minimum=0).tolist() == [2, 1]


@pytest.mark.parametrize(("rule", "expected"), [("floor", 10**9 // 3), ("ceil", 10**9 // 3 + 1)])
def test_a_whole_data_set_of_tokens_does_not_overflow(rule, expected):
    assert kept_count(torch.tensor([10**9]), 1 / 3, rule=rule, minimum=0).tolist() == [expected]


def test_a_third_of_three_is_one():
    assert kept_count(torch.tensor([3, 3000]), 1 / 3, rule="floor", minimum=0).tolist() == [1, 1000]


def test_the_minimum_is_kept_where_there_is_as_much():
    totals = torch.tensor([0, 1, 2, 5, 50])
    assert kept_count(totals, 0.1, rule="floor", minimum=3).tolist() == [0, 1, 2, 3, 5]
    assert kept_count(totals, 0.1, rule="float", minimum=0).tolist() == [0, 0, 0, 0, 5]


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


@given(tokens)
@exactly
def test_everything_is_every_token_with_a_score(tokens):
    scores, group = split(tokens)
    assert top_fraction(scores, group, 4, 1.0).tolist() == (~scores.isnan()).tolist()


@given(tokens, fractions, fractions)
@exactly
def test_a_smaller_fraction_is_part_of_a_larger_one(tokens, one, other):
    smaller, larger = (kept_set(top_fraction(*split(tokens), 4, share)) for share in sorted((one, other)))
    assert smaller <= larger


@given(
    st.lists(st.tuples(st.integers(-40, 40), st.integers(0, 3)), min_size=1, max_size=30),
    st.sampled_from([0.25, 0.5, 1.0, 3.0, 1024.0]),
    st.integers(-1000, 1000),
    fractions,
)
@exactly
def test_a_positive_scale_and_a_shift_change_nothing(tokens, scale, shift, fraction):
    # Small integers times these scales are exact in float32, so ties stay ties.
    scores, group = split(tokens)
    plain = top_fraction(scores.float(), group, 4, fraction)
    assert top_fraction(scale * scores.float() + shift, group, 4, fraction).tolist() == plain.tolist()


def test_the_earliest_wins_a_tie():
    scores = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])
    assert kept_set(top_count(scores, torch.zeros(5).long(), torch.tensor([1]))) == {1}
    assert kept_set(top_count(scores, torch.zeros(5).long(), torch.tensor([3]))) == {0, 1, 3}
    assert kept_set(top_count(torch.tensor([0.0, -0.0]), torch.zeros(2).long(), torch.tensor([1]))) == {0}


def test_the_earliest_wins_among_very_many_ties():
    # Sorting that is not stable keeps short inputs in order by luck.
    scores = (torch.arange(3000) * 7919 % 3).float()
    best = (scores == 2).nonzero()[:, 0]
    assert kept_set(top_count(scores, torch.zeros(3000).long(), torch.tensor([500]))) == set(
        best[:500].tolist()
    )
    half_each = top_count(scores, torch.arange(3000) // 1500, torch.tensor([400, 400]))
    expected = set(best[best < 1500][:400].tolist()) | set(best[best >= 1500][:400].tolist())
    assert kept_set(half_each) == expected


def test_no_score_is_never_kept_even_below_minus_infinity():
    scores = torch.tensor([torch.nan, -torch.inf, torch.nan, -torch.inf])
    assert kept_set(top_count(scores, torch.zeros(4).long(), torch.tensor([1]))) == {1}
    assert kept_set(top_count(scores, torch.zeros(4).long(), torch.tensor([4]))) == {1, 3}
    assert kept_set(top_fraction(torch.full((4,), torch.nan), torch.zeros(4).long(), 1, 1.0)) == set()


def test_groups_need_not_lie_together():
    scores, group = torch.tensor([1.0, 9.0, 2.0, 8.0, 3.0, 7.0]), torch.tensor([2, 0, 2, 0, 2, 0])
    # Group 0 has 9, 8, 7; group 1 nothing; group 2 has 1, 2, 3.
    assert kept_set(top_count(scores, group, torch.tensor([1, 5, 2]))) == {1, 2, 4}


def test_one_number_of_an_owner_worked_by_hand():
    """Owner 0 has 1, 4 and a token without score, owner 1 none that has one, owner 2 a single -2, owner 3 no token."""
    scores = torch.tensor([1.0, torch.nan, -2.0, 4.0, torch.nan])
    owner = torch.tensor([0, 0, 2, 0, 1])
    for how, expected in (("largest", 4.0), ("mean", 2.5), ("sum", 5.0)):
        found = pooled_scores(scores, owner, 4, how=how).tolist()
        assert [found[0], found[2]] == [expected, -2.0], how
        assert all(number != number for number in (found[1], found[3])), how


def test_the_best_come_first_and_the_earlier_of_two_equals():
    scores = torch.tensor([2.0, torch.nan, 5.0, -torch.inf, 2.0, 3.0])
    assert best_places(scores, 4).tolist() == [2, 5, 0, 4]
    assert best_places(scores, 9).tolist() == [2, 5, 0, 4, 3], "-inf is a score, NaN is none"
    assert best_places(scores[1:2], 1).tolist() == []
