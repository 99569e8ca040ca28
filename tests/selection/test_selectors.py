"""Selectors: every knob by hand, the published code's rule, and controls that do not depend on their neighbours."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenward.errors import UserError
from tokenward.selection import KeepAll, ScoredTokens, SideRule, Threshold, TopFraction

HALF = {"chosen": SideRule(fraction=0.5), "rejected": SideRule(fraction=0.5, direction="bottom")}


def scored(*responses, ranks=None, comparisons=None, seeds=None, closed=True) -> ScoredTokens:
    """Responses as lists of scores; pairs, better one first, unless told otherwise. The last token is the end."""
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
    marks = ["".join(".x"[int(weight)] for weight in part) for part in weights.split(lengths(tokens))]
    return marks


def lengths(tokens: ScoredTokens) -> list[int]:
    return torch.bincount(tokens.response, minlength=len(tokens.rank)).tolist()


PAIR = scored([3.0, 1.0, 4.0, 2.0], [3.0, 1.0, 4.0, 2.0])


def test_the_best_of_the_chosen_and_the_worst_of_the_rejected():
    assert kept(TopFraction(**HALF), PAIR) == ["x.x.", ".x.x"]


def test_the_default_is_the_papers_thirty_percent():
    scores = [float(score) for score in range(10)]
    assert kept(TopFraction(), scored(scores, scores)) == [".......xxx", "xxx......."]


def test_sides_are_independent():
    rules = {"chosen": SideRule(fraction=0.25), "rejected": SideRule(fraction=1.0, direction="bottom")}
    assert kept(TopFraction(**rules), PAIR) == ["..x.", "xxxx"]


@pytest.mark.parametrize(
    ("direction", "expected"), [("top", "..xx."), ("bottom", "x...x"), ("magnitude", "x.x..")]
)
def test_directions(direction, expected):
    rule = SideRule(fraction=0.4, direction=direction)
    tokens = scored([-5.0, 0.5, 3.0, 1.0, -2.0], [-5.0, 0.5, 3.0, 1.0, -2.0])
    assert kept(TopFraction(chosen=rule, rejected=rule), tokens) == [expected, expected]


def test_all_but_the_best_count_as_rejected():
    tokens = scored([1.0, 2.0], [1.0, 2.0], [1.0, 2.0], ranks=[1, 0, 2], comparisons=[0, 0, 0])
    assert kept(TopFraction(**HALF), tokens) == ["x.", ".x", "x."]


def test_counts_are_exact_and_the_rules_selectable():
    # 0.7 x 90 is 63; as floats it is 62.99..., and the published code keeps 62.
    scores = [float(score) for score in range(90)]
    rules = {"chosen": SideRule(fraction=0.7), "rejected": SideRule(fraction=0.7)}
    for count, expected in {"floor": 63, "round": 63, "ceil": 63, "float": 62}.items():
        weights = TopFraction(**rules, count=count)(scored(scores, scores))
        assert weights.split(90)[0].sum().item() == expected
    three = scored([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert kept(TopFraction(**HALF, count="floor"), three) == ["..x", "x.."]
    assert kept(TopFraction(**HALF, count="round"), three) == [".xx", "xx."]


def test_the_minimum():
    tokens = scored([1.0, 2.0, 3.0], [5.0, 4.0])
    assert kept(TopFraction(), tokens) == ["..x", ".x"]
    assert kept(TopFraction(minimum=0), tokens) == ["...", ".."]
    assert kept(TopFraction(minimum=2), tokens) == [".xx", "xx"]


def test_the_first_token_can_be_left_out_and_is_then_not_counted():
    # 0.5 x 4 = 2 with it, 0.5 x 3 = 1 without.
    tokens = scored([9.0, 1.0, 4.0, 2.0], [-9.0, 1.0, 4.0, 2.0])
    assert kept(TopFraction(**HALF), tokens) == ["x.x.", "xx.."]
    assert kept(TopFraction(**HALF, first_token=False), tokens) == ["..x.", ".x.."]


@pytest.mark.parametrize(
    ("eos", "expected"),
    [
        ("both", ["..xx", "..xx"]),
        ("chosen", ["..xx", "..x."]),
        ("rejected", ["..x.", "..xx"]),
        ("none", ["..x.", "..x."]),
    ],
)
def test_whose_ends_are_eligible(eos, expected):
    # 0.5 x 4 = 2 with the end, 0.5 x 3 = 1 without.
    tokens = scored([1.0, 2.0, 8.0, 9.0], [5.0, -7.0, -8.0, -9.0])
    assert kept(TopFraction(**HALF, eos=eos), tokens) == expected


def test_a_cut_response_has_no_end_to_leave_out():
    tokens = scored([1.0, 2.0, 8.0, 9.0], [1.0, 2.0, 8.0, 9.0], closed=False)
    assert kept(TopFraction(**HALF, eos="none"), tokens) == ["..xx", "xx.."]


def test_scopes():
    # Two pairs; the chosen ones hold 1..4 and 5..8, so the best half of all chosen tokens is the second pair's.
    tokens = scored([1.0, 2.0, 3.0, 4.0], [1.0, 2.0], [5.0, 6.0, 7.0, 8.0], [3.0, 4.0])
    per_response = ["..xx", "x.", "..xx", "x."]
    assert kept(TopFraction(**HALF, scope="response"), tokens) == per_response
    assert kept(TopFraction(**HALF, scope="comparison"), tokens) == per_response
    of_all = ["....", "xx", "xxxx", ".."]
    assert kept(TopFraction(**HALF, scope="batch"), tokens) == of_all
    assert kept(TopFraction(**HALF, scope="dataset"), tokens) == of_all


def test_the_scope_of_a_comparison_is_one_side_of_it():
    # The rejected side of the first comparison holds 1, 2 and 3, 4; half of four is the worst two.
    tokens = scored(
        [9.0, 1.0],
        [1.0, 2.0],
        [3.0, 4.0],
        [5.0, 6.0],
        [0.0, 1.0],
        ranks=[0, 1, 2, 0, 1],
        comparisons=[0, 0, 0, 1, 1],
    )
    assert kept(TopFraction(**HALF, scope="response"), tokens) == ["x.", "x.", "x.", ".x", "x."]
    assert kept(TopFraction(**HALF, scope="comparison"), tokens) == ["x.", "xx", "..", ".x", "x."]


def test_ties_go_to_the_earliest():
    assert kept(TopFraction(**HALF), scored([1.0] * 6, [1.0] * 6)) == ["xxx...", "xxx..."]


def test_random_ties_move_ties_only():
    scores = [2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    seen = {
        tuple(kept(TopFraction(**HALF, ties="random", seed=seed), scored(scores, scores)))
        for seed in range(8)
    }
    assert len(seen) > 1
    for chosen, rejected in seen:
        assert (chosen.count("x"), rejected.count("x")) == (4, 4)
        assert (chosen[0], chosen[-1]) == ("x", ".")
        assert (rejected[0], rejected[-1]) == (".", "x")
    selector = TopFraction(**HALF, ties="random", seed=3)
    assert kept(selector, scored(scores, scores)) == kept(selector, scored(scores, scores))


@pytest.mark.parametrize("seed", [0, 3, 4, 42, 2**31, 2**63, -1])
def test_any_seed_can_be_written(seed):
    rule = SideRule(fraction=0.5, direction="random")
    selector = TopFraction(chosen=rule, rejected=rule, seed=seed, ties="random")
    assert [marks.count("x") for marks in kept(selector, PAIR)] == [2, 2]


def random_half(seed: int) -> TopFraction:
    rule = SideRule(fraction=0.5, direction="random")
    return TopFraction(chosen=rule, rejected=rule, seed=seed)


def test_a_random_choice_does_not_depend_on_the_scores_or_on_other_responses():
    scores = [0.0] * 20
    alone = kept(random_half(1), scored(scores, scores, seeds=[5, 6]))
    others = kept(random_half(1), scored([1.0] * 7, scores, scores, [3.0] * 20, seeds=[8, 6, 5, 9]))
    assert [others[2], others[1]] == alone
    assert kept(random_half(1), scored([float(i) for i in range(20)], scores, seeds=[5, 6])) == alone


def test_a_random_choice_depends_on_the_seed_and_the_response():
    scores = [0.0] * 20
    one, other = kept(random_half(1), scored(scores, scores, seeds=[5, 6]))
    assert one != other
    assert kept(random_half(2), scored(scores, scores, seeds=[5, 6]))[0] != one


def test_a_random_choice_takes_each_place_equally_often():
    # 400 responses of 10 tokens, 5 kept of each: 200 per place, standard deviation 10.
    tokens = scored(*[[0.0] * 10] * 400, seeds=list(range(400)))
    per_place = random_half(0)(tokens).reshape(400, 10).sum(0)
    assert per_place.min() > 150
    assert per_place.max() < 250


def test_tokens_without_a_score_are_neither_counted_nor_kept():
    nan = float("nan")
    tokens = scored([nan, 1.0, 3.0, nan], [nan, nan])
    for rules in (HALF, {"chosen": SideRule(fraction=0.5, direction="random"), "rejected": HALF["rejected"]}):
        marks = kept(TopFraction(**rules), tokens)
        assert marks[0].count("x") == 1
        assert (marks[0][0], marks[0][3], marks[1]) == (".", ".", "..")


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
    rules = {
        "chosen": SideRule(fraction=fraction),
        "rejected": SideRule(fraction=fraction, direction="bottom"),
    }
    found = kept(TopFraction(**rules, profile="official"), scored(*responses))
    assert found == published_masks(*responses, fraction)


def test_the_official_profile_by_hand():
    # 0.7 x 90 scored tokens: 62 of them, and never the first of the 91.
    scores = [100.0] + [float(score) for score in range(90)]
    rules = {"chosen": SideRule(fraction=0.7), "rejected": SideRule(fraction=0.7)}
    marks = kept(TopFraction(**rules, profile="official"), scored(scores, scores))
    assert marks == ["." * 29 + "x" * 62, "." + "x" * 62 + "." * 28]
    # int(0.3 x 3) = 0: nothing is kept, not one.
    assert kept(TopFraction(profile="official"), PAIR) == ["....", "...."]


def test_a_positive_scale_and_a_shift_change_nothing():
    tokens = scored([3.0, -1.0, 0.5, 2.0, 2.0], [3.0, -1.0, 0.5, 2.0, 2.0])
    moved = tokens._replace(scores=8 * tokens.scores - 3)
    assert kept(TopFraction(**HALF), moved) == kept(TopFraction(**HALF), tokens)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_a_fraction_outside_its_range_is_refused(fraction):
    with pytest.raises(UserError, match="fraction"):
        SideRule(fraction=fraction)


def test_threshold_by_hand():
    tokens = scored([0.5, 0.6, -2.0, 0.7], [0.5, -0.5, -0.6, -0.7])
    assert kept(Threshold(above=0.5), tokens) == [".x.x", "..xx"]
    assert kept(Threshold(above=0.5, below=0.0), tokens) == [".x.x", ".xxx"]
    assert kept(Threshold(), tokens) == ["xx.x", ".xxx"]
    assert kept(Threshold(above=9.0), tokens) == ["....", "...."]


@pytest.mark.parametrize(
    ("eos", "expected"),
    [("both", [".x", ".x"]), ("chosen", [".x", ".."]), ("rejected", ["..", ".x"]), ("none", ["..", ".."])],
)
def test_threshold_and_ends(eos, expected):
    assert kept(Threshold(eos=eos), scored([-1.0, 1.0], [1.0, -1.0])) == expected


def test_keep_all():
    assert kept(KeepAll(), PAIR) == ["xxxx", "xxxx"]
