"""Values between tokenizations: worked by hand, then the laws of the map over random spans."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenward.ops.alignment import Covered, carried, overlaps, segments, sums_of_segments

often = settings(derandomize=True, deadline=None, max_examples=100)


def spans(*tokens: tuple[int, int], part: list[int] | None = None) -> Covered:
    starts, ends = zip(*tokens, strict=True) if tokens else ((), ())
    return Covered(
        torch.tensor(starts).long(), torch.tensor(ends).long(), torch.tensor(part or [0] * len(tokens))
    )


def moved(values: list[float], source: Covered, target: Covered) -> list[float]:
    return carried(torch.tensor(values), overlaps(source, target), len(target.start)).tolist()


def test_by_hand():
    source, target = spans((0, 4), (4, 6), (6, 7)), spans((0, 1), (1, 4), (4, 5), (5, 7))
    # 1/4 and 3/4 of 8; half of 6; the other half of 6, and 1.
    assert moved([8.0, 6.0, 1.0], source, target) == [2.0, 6.0, 3.0, 4.0]
    # Both begin a token at 0 and at 4: the token 4 to 6 reaches into the last one of the target.
    assert segments(overlaps(source, target), target).tolist() == [0, 0, 1, 1]
    # The other way round, the last token of 5 to 7 is divided.
    assert moved([2.0, 6.0, 3.0, 4.0], target, source) == [8.0, 5.0, 2.0]
    assert segments(overlaps(target, source), source).tolist() == [0, 1, 1]


def test_tokens_without_text_give_to_their_like_or_to_the_next_text():
    # The space that one tokenizer adds before a text, and a character of two tokens that share it.
    source, target = spans((0, 0), (0, 3), (3, 5), (5, 5)), spans((0, 3), (3, 5))
    assert moved([1.0, 2.0, 4.0, 8.0], source, target) == [3.0, 12.0]
    # Nothing is given to the one of the target, which belongs to the token after it.
    back = overlaps(target, source)
    assert moved([3.0, 12.0], target, source)[1:3] == [3.0, 12.0]
    assert segments(back, source).tolist() == [0, 0, 1, 1]
    # One to one if there are as many, else in equal parts.
    assert moved([1.0, 2.0], spans((4, 4), (4, 4)), spans((4, 4), (4, 4))) == [1.0, 2.0]
    assert moved([1.0, 2.0], spans((4, 4), (4, 4)), spans((4, 4))) == [3.0]
    assert moved([3.0], spans((4, 4)), spans((4, 4), (4, 4))) == [1.5, 1.5]


def test_an_end_of_turn_goes_to_the_end_of_turn_only():
    text, end = spans((0, 2), (2, 2), part=[0, 1]), spans((0, 1), (1, 2), (2, 2), part=[0, 0, 1])
    assert moved([4.0, 7.0], text, end) == [2.0, 2.0, 7.0]
    assert segments(overlaps(text, end), end).tolist() == [0, 0, 1]
    cut = spans((0, 1), (1, 2))
    assert moved([4.0, 7.0], text, cut) == [2.0, 2.0]  # it was cut off: its value has no place
    assert moved([2.0, 2.0], cut, text)[0] == 4.0
    assert math.isnan(moved([2.0, 2.0], cut, text)[1])


def test_a_text_that_only_one_side_reads():
    # The target was cut after 3 bytes, the source after 6 of 8.
    assert moved([4.0, 2.0], spans((0, 4), (4, 6)), spans((0, 3))) == [4.0]
    values = moved([4.0, 2.0], spans((0, 4), (4, 6)), spans((0, 4), (4, 8), (8, 9)))
    assert values[:2] == [4.0, 2.0]
    assert math.isnan(values[2])


def test_sums_of_segments_leave_out_missing_scores():
    scores, segment = torch.tensor([1.0, torch.nan, 2.0, torch.nan]), torch.tensor([0, 0, 1, 2])
    assert sums_of_segments(scores, segment).tolist() == pytest.approx([1.0, 2.0, math.nan], nan_ok=True)


@st.composite
def tokenized(draw, length: int = 24) -> Covered:
    """A text of one or two stretches as tokens, some of them without text."""
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=12)))
    edges = [0, *cuts, length]
    tokens = list(pairwise(edges))
    ends = draw(st.integers(1, 2))
    return spans(*tokens, *[(length, length)] * ends, part=[0] * len(tokens) + [1] * ends)


@given(tokenized(), tokenized(), st.integers(0, 2**31))
@often
def test_the_laws(source, target, seed):
    count = len(source.start)
    drawn = torch.randn(2, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    first, second = 3 * drawn
    found = overlaps(source, target)
    made = carried(first, found, len(target.start))
    # The sum is kept, in total and in each segment.
    assert float(made.nansum()) == pytest.approx(float(first.sum()), abs=1e-12)
    segment = segments(found, target)
    own = torch.zeros(count, dtype=torch.long).index_put_((found.source,), segment[found.target])
    sums = torch.zeros(int(segment[-1]) + 1).double().index_add_(0, own, first)
    assert torch.allclose(sums_of_segments(made, segment).nan_to_num(0.0), sums, atol=1e-12, rtol=0)
    # It is linear.
    both = carried(2 * first - second, found, len(target.start))
    apart = 2 * made - carried(second, found, len(target.start))
    assert torch.allclose(both, apart, atol=1e-12, rtol=0, equal_nan=True)
    # Equal tokens keep their values to the bit, each in a segment of its own.
    same = overlaps(source, source)
    assert torch.equal(carried(first, same, count), first)
    assert torch.equal(segments(same, source), torch.arange(count))


@given(tokenized(), tokenized())
@often
def test_segments_end_where_a_token_of_both_begins(source, target):
    """By definition, over the tokens with text."""
    segment = segments(overlaps(source, target), target)
    inside = {place for start, end in zip(*source[:2], strict=True) for place in range(start + 1, end)}
    texts = torch.nonzero((target.end > target.start) & (target.part == 0))[:, 0]
    for one, other in pairwise(texts.tolist()):
        assert (segment[one] == segment[other]) == (int(target.start[other]) in inside)


@given(st.lists(st.tuples(tokenized(), tokenized()), min_size=2, max_size=3))
@often
def test_many_texts_at_once(pairs):
    """The texts of several responses, laid end to end, give what each of them gives alone."""

    def end_to_end(sides: list[Covered]) -> Covered:
        parts = [Covered(s.start + 30 * i, s.end + 30 * i, s.part + 2 * i) for i, s in enumerate(sides)]
        return Covered(*(torch.cat(column) for column in zip(*parts, strict=True)))

    source, target = (end_to_end(list(side)) for side in zip(*pairs, strict=True))
    values = torch.arange(len(source.start)).double() + 0.5
    found = overlaps(source, target)
    alone, numbers, done, before = [], [], 0, 0
    for one, other in pairs:
        part = overlaps(one, other)
        alone.append(carried(values[done : done + len(one.start)], part, len(other.start)))
        numbers.append(segments(part, other) + before)
        done, before = done + len(one.start), int(numbers[-1][-1]) + 1
    assert torch.equal(carried(values, found, len(target.start)).nan_to_num(), torch.cat(alone).nan_to_num())
    assert torch.equal(segments(found, target), torch.cat(numbers))
