"""Scores to ranks, and which groups teach no order."""

import pytest

from tokenward.sampling.sampler import Reply
from tokenward.sampling.sources import Group, rank_groups, ranked


def reply(text: str) -> Reply:
    return Reply([len(text)], text, ended=True)


def group(*scores: float) -> Group:
    size = len(scores)
    return Group([[index] for index in range(size)], [str(s) for s in scores], [True] * size, list(scores))


@pytest.mark.parametrize(
    ("scores", "ranks"),
    [
        ((0.2, 0.9, 0.5), (2, 0, 1)),
        # Ranks are dense: after two that tie for the best comes 1, not 2.
        ((0.9, 0.9, 0.1, 0.3), (0, 0, 2, 1)),
        ((-3.0, -1.0), (1, 0)),
        ((0.0, -0.0, -1.0), (0, 0, 1)),
    ],
)
def test_ranks_by_hand(scores, ranks):
    assert [row.ranks for row in rank_groups({7: group(*scores)}).rows] == [ranks]


def test_ranks_do_not_change_under_an_increasing_map():
    scores = [0.3, -1.0, 0.3, 2.0, 0.0]
    mapped = [10 * score**3 + 5 for score in scores]
    assert rank_groups({0: group(*scores)}).rows[0].ranks == rank_groups({0: group(*mapped)}).rows[0].ranks


def test_groups_without_an_order_are_dropped_and_counted():
    given = {0: group(1.0), 1: group(0.5, 0.5, 0.5), 2: group(0.5, 0.6), 3: group(2.0), 5: group(1.0, 1.0)}
    found = rank_groups(given)
    assert [(row.row, row.ranks) for row in found.rows] == [(2, (1, 0))]
    assert found.rows[0].group is given[2]
    assert found.counts == {"dropped: one response": 2, "dropped: all responses tied": 2}
    assert rank_groups({2: given[2]}).counts == {}


def test_replies_are_grouped_by_the_row_of_their_prompt():
    replies = [reply("aa"), reply("b"), Reply([8, 9], "cut", ended=False), reply("dddd"), reply("e")]
    found = ranked([4, 2, 4, 2, 9], replies, [0.1, 0.7, 0.6, 0.2, 1.0])
    first, second = found.rows
    assert (first.row, first.ranks) == (4, (1, 0))
    assert first.group == Group([[2], [8, 9]], ["aa", "cut"], [True, False], [0.1, 0.6])
    assert (second.row, second.ranks, second.group.texts) == (2, (0, 1), ["b", "dddd"])
    assert found.counts == {"dropped: one response": 1}


def test_every_reply_needs_a_row_and_a_score():
    with pytest.raises(ValueError, match="zip"):
        ranked([0, 0], [reply("a"), reply("b")], [1.0])
