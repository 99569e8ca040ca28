"""Selectors that keep tokens: every setting by hand, the published code's rule, and controls independent of their neighbours."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenward.errors import UserError
from tokenward.selection import KeepAll, ScoredTokens, SideRule, Threshold, TopFraction

NAN = math.nan
HALF = {"chosen": SideRule(fraction=0.5), "rejected": SideRule(fraction=0.5, direction="bottom")}


def both(**rule):
    """One rule for both sides."""
    return {"chosen": SideRule(**rule), "rejected": SideRule(**rule)}


def scored(*responses, ranks=None, comparisons=None, seeds=None, closed=True) -> ScoredTokens:
    """Responses as lists of scores; by default pairs, chosen first. The last token is the end-of-turn token."""
    lengths = torch.tensor([len(scores) for scores in responses])
    owner = torch.repeat_interleave(torch.arange(len(responses)), lengths)
    last = torch.cat([torch.arange(n) == n - 1 for n in lengths.tolist()])
    return ScoredTokens(
        scores=torch.tensor([score for scores in responses for score in scores], dtype=torch.float32),
        response=owner,
        comparison=torch.tensor(comparisons or [index // 2 for index in range(len(responses))]),
        rank=torch.tensor(ranks or [index % 2 for index in range(len(responses))]),
        eos=last & closed,
        seeds=torch.tensor(seeds or [1000 + 17 * index for index in range(len(responses))]),
    )


def kept(selector, tokens: ScoredTokens) -> list[str]:
    """One string per response: x where the token is kept."""
    weights = selector(tokens)
    assert weights.dtype == torch.float32
    assert set(weights.tolist()) <= {0.0, 1.0}
    lengths = torch.bincount(tokens.response, minlength=len(tokens.rank)).tolist()
    return ["".join(".x"[int(weight)] for weight in part) for part in weights.split(lengths)]


PAIR = scored([3.0, 1.0, 4.0, 2.0], [3.0, 1.0, 4.0, 2.0])
TEN = scored([*range(10)], [*range(10)])
FIVE = scored([-5.0, 0.5, 3.0, 1.0, -2.0], [-5.0, 0.5, 3.0, 1.0, -2.0])
SHORT = scored([1.0, 2.0, 3.0], [5.0, 4.0])
# 0.5 x 4 = 2 tokens with the first or last one, 0.5 x 3 = 1 without.
ENDS = scored([1.0, 2.0, 8.0, 9.0], [5.0, -7.0, -8.0, -9.0])
FIRST = scored([9.0, 1.0, 4.0, 2.0], [-9.0, 1.0, 4.0, 2.0])
# The chosen responses hold 1..4 and 5..8: the best half of all chosen tokens is the second one.
TWO = scored([1.0, 2.0, 3.0, 4.0], [1.0, 2.0], [5.0, 6.0, 7.0, 8.0], [3.0, 4.0])
# The rejected side of the first comparison holds 1, 2 and 3, 4.
RANKED = scored(
    [9.0, 1.0], [1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [0.0, 1.0],
    ranks=[0, 1, 2, 0, 1], comparisons=[0, 0, 0, 1, 1],
)  # fmt: skip
LACKING = scored([NAN, 1.0, 3.0, NAN], [NAN, NAN])


@pytest.mark.parametrize(
    ("selector", "tokens", "expected"),
    [
        (TopFraction(**HALF), PAIR, ["x.x.", ".x.x"]),
        (TopFraction(), TEN, [".......xxx", "xxx......."]),  # the paper's 30 %
        (TopFraction(0.5), PAIR, ["x.x.", ".x.x"]),
        (TopFraction(chosen=SideRule(fraction=0.25), rejected=SideRule(fraction=1.0)), PAIR, ["..x.", "xxxx"]),
        (TopFraction(**both(fraction=0.4, direction="top")), FIVE, ["..xx.", "..xx."]),
        (TopFraction(**both(fraction=0.4, direction="bottom")), FIVE, ["x...x", "x...x"]),
        (TopFraction(**both(fraction=0.4, direction="magnitude")), FIVE, ["x.x..", "x.x.."]),
        (TopFraction(**HALF, count="floor"), scored([1, 2, 3], [1, 2, 3]), ["..x", "x.."]),
        (TopFraction(**HALF, count="round"), scored([1, 2, 3], [1, 2, 3]), [".xx", "xx."]),
        (TopFraction(), SHORT, ["..x", ".x"]),
        (TopFraction(minimum=0), SHORT, ["...", ".."]),
        (TopFraction(minimum=2), SHORT, [".xx", "xx"]),
        (TopFraction(**HALF), FIRST, ["x.x.", "xx.."]),
        (TopFraction(**HALF, first_token=False), FIRST, ["..x.", ".x.."]),
        (TopFraction(**HALF, eos="both"), ENDS, ["..xx", "..xx"]),
        (TopFraction(**HALF, eos="chosen"), ENDS, ["..xx", "..x."]),
        (TopFraction(**HALF, eos="rejected"), ENDS, ["..x.", "..xx"]),
        (TopFraction(**HALF, eos="none"), ENDS, ["..x.", "..x."]),
        (TopFraction(**HALF, eos="always"), ENDS, ["..xx", "..x."]),
        # A truncated response has no end-of-turn token to leave out.
        (TopFraction(**HALF, eos="none"), ENDS._replace(eos=ENDS.eos & False), ["..xx", "..xx"]),
        (TopFraction(**HALF, scope="response"), TWO, ["..xx", "x.", "..xx", "x."]),
        (TopFraction(**HALF, scope="comparison"), TWO, ["..xx", "x.", "..xx", "x."]),
        (TopFraction(**HALF, scope="batch"), TWO, ["....", "xx", "xxxx", ".."]),
        (TopFraction(**HALF, scope="dataset"), TWO, ["....", "xx", "xxxx", ".."]),
        (TopFraction(**HALF, scope="response"), RANKED, ["x.", "x.", "x.", ".x", "x."]),
        (TopFraction(**HALF, scope="comparison"), RANKED, ["x.", "xx", "..", ".x", "x."]),
        (TopFraction(**HALF), scored([1.0] * 6, [1.0] * 6), ["xxx...", "xxx..."]),
        (TopFraction(**HALF), LACKING, ["..x.", ".."]),
        (Threshold(), FIVE, [".xxx.", "x...x"]),
        (Threshold(above=0.5), FIVE, ["..xx.", "x...x"]),
        (Threshold(above=0.5, below=1.0), FIVE, ["..xx.", "xx..x"]),
        (Threshold(above=9.0), FIVE, [".....", "....."]),
        (Threshold(eos="both"), scored([-1.0, 1.0], [1.0, -1.0]), [".x", ".x"]),
        (Threshold(eos="chosen"), scored([-1.0, 1.0], [1.0, -1.0]), [".x", ".."]),
        (KeepAll(), PAIR, ["xxxx", "xxxx"]),
    ],
)  # fmt: skip
def test_by_hand(selector, tokens, expected):
    assert kept(selector, tokens) == expected


def test_counts_are_exact():
    # 0.7 x 90 is 63; in floating point it is 62.99..., and the published code keeps 62.
    scores = [float(score) for score in range(90)]
    for count, expected in {"floor": 63, "round": 63, "ceil": 63, "float": 62}.items():
        weights = TopFraction(**both(fraction=0.7), count=count)(scored(scores, scores))
        assert weights.split(90)[0].sum().item() == expected


def test_random_ties_change_only_ties():
    scores = [2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    seen = {
        tuple(kept(TopFraction(**HALF, ties="random", seed=seed), scored(scores, scores)))
        for seed in (*range(8), *range(8))
    }
    assert 1 < len(seen) <= 8
    for chosen, rejected in seen:
        assert (chosen.count("x"), rejected.count("x")) == (4, 4)
        assert (chosen[0], chosen[-1]) == ("x", ".")
        assert (rejected[0], rejected[-1]) == (".", "x")


@pytest.mark.parametrize("seed", [0, 4, 2**31, 2**63, -1])
def test_every_whole_number_is_a_seed(seed):
    selector = TopFraction(**both(fraction=0.5, direction="random"), seed=seed, ties="random")
    assert [marks.count("x") for marks in kept(selector, PAIR)] == [2, 2]


def random_half(seed: int) -> TopFraction:
    return TopFraction(**both(fraction=0.5, direction="random"), seed=seed)


def test_a_random_choice_depends_only_on_the_seed_and_the_response():
    scores = [0.0] * 20
    alone = kept(random_half(1), scored(scores, scores, seeds=[5, 6]))
    others = kept(random_half(1), scored([1.0] * 7, scores, scores, [3.0] * 20, seeds=[8, 6, 5, 9]))
    assert [others[2], others[1]] == alone
    assert kept(random_half(1), scored([float(i) for i in range(20)], scores, seeds=[5, 6])) == alone
    assert alone[0] != alone[1]
    assert kept(random_half(2), scored(scores, scores, seeds=[5, 6]))[0] != alone[0]


def test_a_random_choice_keeps_every_position_equally_often():
    # 400 responses of 10 tokens, 5 kept of each: 200 per position, standard deviation 10.
    tokens = scored(*[[0.0] * 10] * 400, seeds=list(range(400)))
    per_place = random_half(0)(tokens).reshape(400, 10).sum(0)
    assert 150 < per_place.min() <= per_place.max() < 250
    # Tokens without a score are neither counted nor kept.
    marks = kept(random_half(0), LACKING)
    assert (marks[0].count("x"), marks[0][0], marks[0][3], marks[1]) == (1, ".", ".", "..")


def published_masks(chosen: list[float], rejected: list[float], fraction: float) -> list[str]:
    """The published rule in index arithmetic: scores of tokens 1.., int(k n) times the first extreme.

    The token at place i + 1 has score i there, because the first one is never scored.
    """
    marks = []
    for scores, pick in ((chosen, max), (rejected, min)):
        left = dict(enumerate(scores[1:]))
        taken = set()
        for _ in range(int(fraction * len(left))):
            best = pick(left.values())
            place = min(index for index, score in left.items() if score == best)
            taken.add(place + 1)
            del left[place]
        marks.append("".join(".x"[index in taken] for index in range(len(scores))))
    return marks


@given(
    st.lists(st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=30), min_size=2, max_size=2),
    st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9]),
)
@settings(derandomize=True, deadline=None, max_examples=50)
def test_the_official_profile_is_the_published_rule(responses, fraction):
    selector = TopFraction(fraction, profile="official")
    assert kept(selector, scored(*responses)) == published_masks(*responses, fraction)


def test_the_official_profile_by_hand():
    # 0.7 x 90 scored tokens: 62 of them, and never the first of the 91.
    scores = [100.0] + [float(score) for score in range(90)]
    marks = kept(TopFraction(0.7, profile="official"), scored(scores, scores))
    assert marks == ["." * 29 + "x" * 62, "." + "x" * 62 + "." * 28]
    # int(0.3 x 3) = 0: nothing is kept, not one.
    assert kept(TopFraction(profile="official"), PAIR) == ["....", "...."]


def test_a_positive_scale_and_a_shift_change_nothing():
    tokens = scored([3.0, -1.0, 0.5, 2.0, 2.0], [3.0, -1.0, 0.5, 2.0, 2.0])
    moved = tokens._replace(scores=8 * tokens.scores - 3)
    assert kept(TopFraction(**HALF), moved) == kept(TopFraction(**HALF), tokens)


@pytest.mark.parametrize(
    ("kind", "arguments", "code"),
    [
        *[(SideRule, {"fraction": value}, "out-of-range") for value in (0.0, -0.1, 1.01, NAN)],
        (TopFraction, {"fraction": 0.5, "chosen": SideRule(fraction=0.2)}, "conflicting-settings"),
        (TopFraction, {"profile": "official", "minimum": 2}, "conflicting-settings"),
        (Threshold, {"at": "iqr"}, "invalid-value"),
        (Threshold, {"at": "mean", "above": 1.0}, "conflicting-settings"),
    ],
)
def test_impossible_settings_are_refused(kind, arguments, code):
    with pytest.raises(UserError) as caught:
        kind(**arguments)
    assert caught.value.code == code
