"""From scores to weights: for some rows at a time or for all, and at least one token in a step."""

import math
from dataclasses import replace

import pytest
import torch

from tests.selection.test_selectors import PAIR
from tests.tokens.rows import encoded
from tests.tokens.test_table import TEMPLATE, table
from tokenward.errors import UserError
from tokenward.selection import SideRule, SoftWeights, TopFraction, Transform
from tokenward.selection import weights as weighing
from tokenward.selection.weights import selects_alone, weigh, weigh_rows, weigh_step, weights_of
from tokenward.tokens.segments import with_segments
from tokenward.tokens.table import JOINT, TokenTable

SELECTORS = [
    TopFraction(),
    TopFraction(chosen=SideRule(fraction=0.2), eos="none", scope="comparison"),
    TopFraction(chosen=SideRule(fraction=0.01), scope="dataset"),
    TopFraction(chosen=SideRule(direction="random"), ties="random"),
    SoftWeights(transform="exp", spread="sequence"),
    Transform(steps=({"threshold": {"at": "mean", "scope": "dataset"}},)),
    Transform(steps=({"rank_scale": {"scope": "comparison"}},)),
]


def with_scores() -> TokenTable:
    rows = table()
    return rows.with_column("scores", rows.own_column([torch.arange(int(rows.lengths.sum())).sin()]))


def flat(rows) -> torch.Tensor:
    return torch.cat([side for row in rows for side in row.weights])


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_weights_do_not_depend_on_the_number_of_rows_weighed_at_once(monkeypatch, chunk):
    monkeypatch.setattr(weighing, "CHUNK_ROWS", chunk)
    rows = with_scores()
    for selector in SELECTORS:
        weights = flat(weigh(rows, selector))
        assert torch.equal(weights, flat(weigh_rows(selector, list(rows))))
        assert 0 < weights.count_nonzero() <= len(weights)
    assert len(weigh(rows[:0], TopFraction())) == 0


def test_a_selector_that_pools_over_words_receives_them():
    pool = Transform(steps=({"segment_pool": {"segment": "word", "how": "max"}},), signed=True)
    several = 0
    for row in weigh(with_scores(), pool, TEMPLATE.tokenizer):
        words = with_segments("word", TEMPLATE.tokenizer, row).segments
        for scores, weights, word in zip(row.scores, row.weights, words, strict=True):
            assert weights.tolist() == [float(scores[word == one].max()) for one in word.tolist()]
            several += 1 < len(word.unique()) < len(word)
    assert several


def scored_row(*scores, eos=(0, 0)):
    row = encoded([1], *([2] * len(own) for own in scores))
    return replace(row, scores=[torch.tensor(own) for own in scores], eos=list(eos))


def test_a_response_that_a_step_leaves_nothing_keeps_what_its_comparison_alone_would():
    """By hand: the best two chosen tokens of the step are the first row's; the second keeps its own best that may be selected."""
    best, other = (
        scored_row([9.0, 8.0], [-9.0, -8.0]),
        scored_row([0.1, 0.2, 5.0], [0.3, 0.1, -5.0], eos=(1, 1)),
    )
    selector = TopFraction(0.5, scope="batch", eos="none")
    assert [part.tolist() for part in weigh_rows(selector, [best, other])[1].weights] == [
        [0, 0, 0],
        [0, 0, 0],
    ]
    first, second = weigh_step(selector, [best, other])
    assert [part.tolist() for part in first.weights] == [[1, 1], [1, 1]]
    assert [part.tolist() for part in second.weights] == [[0, 1, 0], [0, 1, 0]]
    inverse = replace(selector, chosen=SideRule(fraction=0.5, direction="bottom"), fraction=None)
    low = scored_row([-9.0, -8.0], [-9.0, -8.0])
    assert weigh_step(inverse, [low, other])[1].weights[0].tolist() == [1, 0, 0]


def test_a_row_of_which_nothing_can_be_selected_is_known():
    selector = TopFraction(0.5, scope="batch", eos="none")
    assert selects_alone(selector, scored_row([1.0, 2.0], [3.0, math.nan]))
    assert not selects_alone(selector, scored_row([1.0, 2.0], [math.nan, math.nan]))
    assert not selects_alone(selector, scored_row([1.0], [2.0, 3.0], eos=(1, 0)))


def test_tokens_of_one_segment_are_selected_as_one():
    """As if each segment were a token with the sum of its scores: worked by hand, and equal for whatever weighs them."""
    tokens = PAIR._replace(joint=torch.tensor([0, 0, 1, 2, 0, 1, 1, 1]))
    seen = []

    def keep_first(given):
        seen.append(given)
        return torch.arange(len(given.scores), dtype=torch.float32)

    sums = [float(PAIR.scores[part].sum()) for part in ([0, 1], [2], [3], [4], [5, 6, 7])]
    assert PAIR.response.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert weights_of(keep_first, tokens).tolist() == [0, 0, 1, 2, 3, 4, 4, 4]
    assert seen[0].scores.tolist() == sums
    assert seen[0].response.tolist() == [0, 0, 0, 1, 1]
    assert seen[0].eos.tolist() == PAIR.eos[[0, 2, 3, 4, 5]].tolist()
    assert seen[0].joint is None
    alone = PAIR._replace(joint=torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]))
    rows = with_scores()
    numbers = [torch.arange(size) // 2 for size in rows.lengths.tolist()]
    joined = rows.with_column(JOINT, rows.own_column(numbers))
    for selector in SELECTORS:
        assert torch.equal(weights_of(selector, alone), weights_of(selector, PAIR))
        weights = flat(weigh(joined, selector))
        assert torch.equal(weights, flat(weigh_rows(selector, list(joined))))
        for row in weigh(joined, selector):
            for part in row.weights:
                assert torch.equal(part[0 : len(part) // 2 * 2 : 2], part[1::2])
        assert not torch.equal(weights, flat(weigh(rows, selector)))


@pytest.mark.parametrize(
    ("selector", "words"),
    [
        (lambda tokens: torch.ones(3), r"\(3,\)"),
        (lambda tokens: [], r"\(0,\)"),
        (lambda tokens: torch.full((8,), math.nan), "nan"),
        (lambda tokens: -tokens.scores, "-4 to -1"),
        (lambda tokens: ["a"] * 8, "list"),
        (Transform(steps=({"affine": {"shift": -2.0}},)), r"-1 to 2\..*signed: true"),
        (Transform(steps=({"affine": {"scale": 1e39}},), signed=True), "inf"),
    ],
)
def test_impossible_weights_are_refused(selector, words):
    with pytest.raises(UserError, match=words) as caught:
        weights_of(selector, PAIR)
    assert caught.value.code == "wrong-result"
