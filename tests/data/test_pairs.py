"""Which responses are set against each other, and what each pair carries."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenward.data.pairs import RULES, pairs
from tokenward.data.prepare import comparison_key
from tokenward.errors import UserError
from tokenward.types import Comparison, Message, Span

PROMPT = (Message(role="user", content="p"),)


def comparison(ranks, scores=None, spans=None):
    responses = tuple("abcdefgh"[: len(ranks)])
    key = comparison_key(PROMPT, responses)
    return Comparison(
        key=key,
        prompt=PROMPT,
        responses=responses,
        ranks=tuple(ranks),
        source="f:1",
        scores=scores,
        spans=spans,
    )


def names(found):
    return ["".join(pair.responses) for pair in found]


@pytest.mark.parametrize(
    ("rule", "ranks", "expected"),
    [
        ("best_worst", (1, 0, 2), ["bc"]),
        ("best_worst", (2, 0, 1, 0, 2), ["ba"]),  # ties: the earliest best and the earliest worst
        ("best_worst", (0, 0), []),
        ("all", (1, 0, 2), ["ba", "bc", "ac"]),
        ("all", (0, 1, 1, 0), ["ab", "ac", "db", "dc"]),
        ("adjacent", (1, 0, 2), ["ba", "ac"]),
        ("adjacent", (0, 1, 1, 2), ["ab", "cd"]),
        ("adjacent", (0, 0, 0), []),
    ],
)
def test_pairs_by_hand(rule, ranks, expected):
    assert names(pairs(comparison(ranks), rule)) == expected


def test_a_pair_carries_scores_spans_and_its_own_key():
    spans = ((Span(0, 1, 0.5),), (), (Span(0, 1, -2.0),))
    (pair,) = pairs(comparison((2, 1, 0), (1.0, 2.0, 3.5), spans), "best_worst")
    key = comparison_key(PROMPT, ("a", "c"))
    expected = Comparison(
        key=key,
        prompt=PROMPT,
        responses=("c", "a"),
        ranks=(0, 1),
        source="f:1",
        scores=(3.5, 1.0),
        spans=((Span(0, 1, -2.0),), (Span(0, 1, 0.5),)),
    )
    assert pair == expected


def test_min_gap_leaves_out_closer_pairs_and_those_the_scores_contradict():
    ranked = comparison((0, 1, 2), (4.0, 3.0, 3.5))
    assert names(pairs(ranked, "all", min_gap=0.5)) == ["ab", "ac"]
    assert names(pairs(ranked, "all", min_gap=0.75)) == ["ab"]
    assert names(pairs(ranked, "all", min_gap=0)) == ["ab", "ac"]
    assert names(pairs(ranked, "all")) == ["ab", "ac", "bc"]


def test_errors_name_value_and_remedy():
    with pytest.raises(UserError, match="best-worst is no rule"):
        pairs(comparison((0, 1)), "best-worst")
    with pytest.raises(UserError, match="f:1 has no scores"):
        pairs(comparison((0, 1)), "all", min_gap=1.0)
    with pytest.raises(UserError, match="must not be negative"):
        pairs(comparison((0, 1), (1.0, 0.0)), "all", min_gap=-1)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=8), st.sampled_from(sorted(RULES)))
def test_every_pair_is_in_rank_order_and_named_by_its_content(ranks, rule):
    ranked = comparison(ranks)
    rank = dict(zip(ranked.responses, ranks, strict=True))
    found = pairs(ranked, rule)
    assert bool(found) == (len(set(ranks)) > 1)
    assert all(rank[pair.responses[0]] < rank[pair.responses[1]] for pair in found)
    assert all(pair.ranks == (0, 1) and pair.key == comparison_key(PROMPT, pair.responses) for pair in found)
    assert len({pair.key for pair in found}) == len(found)
    every = names(pairs(ranked, "all"))
    assert len(every) == sum(a < b for a in ranks for b in ranks)
    assert set(names(found)) <= set(every)
