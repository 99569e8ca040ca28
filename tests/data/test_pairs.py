"""Which responses form pairs, and what each pair carries."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenward.data.pairs import RULES, pair_of, pair_places
from tokenward.data.prepare import comparison_key
from tokenward.errors import UserError
from tokenward.types import Comparison, Message, Span

PROMPT = (Message(role="user", content="p"),)


def comparison(ranks, scores=None, spans=None):
    responses = tuple("abcdefgh"[: len(ranks)])
    key = comparison_key(PROMPT, responses)
    rest = {"ranks": tuple(ranks), "source": "f:1", "scores": scores, "spans": spans}
    return Comparison(key=key, prompt=PROMPT, responses=responses, **rest)


def names(row, rule, **options):
    return ["".join(row.responses[place] for place in places) for places in pair_places(row, rule, **options)]


@pytest.mark.parametrize(
    ("rule", "ranks", "expected"),
    [
        ("best_worst", (1, 0, 2), ["bc"]),
        ("best_worst", (2, 0, 1, 0, 2), ["ba"]),  # ties: the earliest best and the earliest worst
        ("best_worst", (0, 0), []),
        ("all", (0, 1, 1, 0), ["ab", "ac", "db", "dc"]),
        ("adjacent", (1, 0, 2), ["ba", "ac"]),
        ("adjacent", (0, 1, 1, 2), ["ab", "cd"]),
        ("adjacent", (0, 0, 0), []),
    ],
)
def test_pairs_by_hand(rule, ranks, expected):
    assert names(comparison(ranks), rule) == expected


def test_a_pair_has_its_own_scores_spans_and_key():
    spans = ((Span(0, 1, 0.5),), (), (Span(0, 1, -2.0),))
    found = pair_of(comparison((2, 1, 0), (1.0, 2.0, 3.5), spans), 2, 0)
    assert found == Comparison(
        key=comparison_key(PROMPT, ("a", "c")),
        prompt=PROMPT,
        responses=("c", "a"),
        ranks=(0, 1),
        source="f:1",
        scores=(3.5, 1.0),
        spans=((Span(0, 1, -2.0),), (Span(0, 1, 0.5),)),
    )


def test_min_gap_leaves_out_closer_pairs_and_those_that_the_scores_contradict():
    ranked = comparison((0, 1, 2), (4.0, 3.0, 3.5))
    assert names(ranked, "all", min_gap=0.5) == ["ab", "ac"]
    assert names(ranked, "all", min_gap=0.75) == ["ab"]
    assert names(ranked, "all") == ["ab", "ac", "bc"]


@pytest.mark.parametrize(
    ("scores", "rule", "min_gap", "code", "key"),
    [
        (None, "best-worst", None, "unknown-name", "data.pairs"),
        (None, "all", 1.0, "missing-scores", "data.min_gap"),
        ((1.0, 0.0), "all", -1, "out-of-range", "data.min_gap"),
    ],
)
def test_errors(scores, rule, min_gap, code, key):
    with pytest.raises(UserError) as error:
        pair_places(comparison((0, 1), scores), rule, min_gap=min_gap)
    assert (error.value.code, error.value.key) == (code, key)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=8), st.sampled_from(sorted(RULES)))
def test_every_pair_is_in_rank_order_and_occurs_once(ranks, rule):
    ranked = comparison(ranks)
    found = pair_places(ranked, rule)
    assert bool(found) == (len(set(ranks)) > 1)
    assert all(ranks[better] < ranks[worse] for better, worse in found)
    assert len(set(found)) == len(found)
    every = pair_places(ranked, "all")
    assert len(every) == sum(a < b for a in ranks for b in ranks)
    assert set(found) <= set(every)
