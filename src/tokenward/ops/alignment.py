# torch leaves parts of what is used here untyped.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
"""Values of one tokenizer's tokens as values of another's: spread over the bytes of a text, and summed.

    s'_j = sum_i s_i * |span_i and span_j| / |bytes of span_i that have a token|

The sum is kept, equal tokens keep their values to the bit, and the map is linear. Within the shortest stretches at whose
ends a token of both begins (segments), how the sum is divided is an assumption; the sums of segments are not.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tokenward.ops.ragged import segment_sum


class Covered(NamedTuple):
    """The bytes that the tokens of some texts cover, in rising order.  [n] int64 each

    Attributes:
        start: First byte.
        end: Byte after the last one; equal to ``start`` for a token without text. Covered do not overlap.
        part: Number of the stretch that the token is in, rising. Values never go from one stretch to another: the text and
            the end of a turn are different stretches, and so are two texts. Stretches do not share bytes.
    """

    start: Tensor
    end: Tensor
    part: Tensor


class Overlaps(NamedTuple):
    """Which part of its value each source token gives to a target token.  [m] each

    Attributes:
        source: Index of the source token.
        target: Index of the target token.
        share: float64; the shares of a source token that has any sum to 1.
    """

    source: Tensor
    target: Tensor
    share: Tensor


def overlaps(source: Covered, target: Covered) -> Overlaps:
    """How the values of source tokens are divided among target tokens.

    A value is spread evenly over the token's bytes that target tokens cover. A token without text, such as an end of turn
    or the space that a tokenizer adds before a text, gives its value to the target tokens without text at its place, one to
    one if there are as many, else in equal parts; if there are none, to the next token with text in its stretch, or to the
    last one.
    """
    found = [_of_bytes(source, target), _of_empty(source, target)]
    one, other, share = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = torch.argsort(one * max(len(target.start), 1) + other, stable=True)
    return Overlaps(one[order], other[order], share[order])


def carried(values: Tensor, found: Overlaps, count: int) -> Tensor:
    """The values of ``count`` target tokens; NaN where no source token gives anything.  [n], -> [count] float64"""
    parts = values.double()[found.source] * found.share
    total = segment_sum(parts, found.target, count)
    return torch.where(torch.bincount(found.target, minlength=count) > 0, total, torch.nan)


def segments(found: Overlaps, target: Covered) -> Tensor:
    """The segment of each target token, rising: tokens that one source token gives a value to are in one segment.  -> [k]

    Target tokens without text that nothing is given to belong to the segment of the next token, or of the last one.
    """
    count = len(target.start)
    least = torch.full((int(found.source.max()) + 1 if len(found.source) else 0,), count)
    least = least.scatter_reduce(0, found.source, found.target, "amin")
    most = torch.full_like(least, -1).scatter_reduce(0, found.source, found.target, "amax")
    several = most > least
    edges = torch.zeros(count + 1, dtype=torch.long)
    edges.index_add_(0, least[several], torch.ones_like(least[several]))
    edges.index_add_(0, most[several], -torch.ones_like(most[several]))
    joined = edges.cumsum(0)[:count] > 0  # with the token after it
    lonely = torch.nonzero(target.start == target.end)[:, 0]
    lonely = lonely[~torch.isin(lonely, found.target)]
    # A token without text may stand between the tokens of one character, or beside others like it.
    for token, host in zip(lonely.tolist(), _hosts(lonely, target, target).tolist(), strict=True):
        first, last = min(token, host), max(token, host)
        joined[first:last] |= host >= 0
    return torch.cat([torch.zeros(min(count, 1), dtype=torch.long), (~joined[: count - 1]).long().cumsum(0)])


def sums_of_segments(scores: Tensor, segment: Tensor) -> Tensor:
    """Sum of each segment's scores, without its NaN; NaN for a segment without a score.  [n], [n] -> [segments] float64"""
    count = int(segment[-1]) + 1 if len(segment) else 0
    present = ~scores.isnan()
    total = segment_sum(torch.where(present, scores, 0.0).double(), segment, count)
    return torch.where(segment_sum(present.long(), segment, count) > 0, total, torch.nan)


def _of_bytes(source: Covered, target: Covered) -> Overlaps:
    """The parts of tokens with text."""
    length = int(torch.cat([source.end, target.end]).max()) if len(source.end) + len(target.end) else 0
    mine, other = _owners(source, length), _owners(target, length)
    both = (mine >= 0) & (other >= 0)
    pairs, widths = torch.unique_consecutive(
        mine[both] * max(len(target.start), 1) + other[both], return_counts=True
    )
    one, two = pairs // max(len(target.start), 1), pairs % max(len(target.start), 1)
    covered = segment_sum(widths, one, len(source.start))[one]
    return Overlaps(one, two, widths.double() / covered)


def _owners(spans: Covered, length: int) -> Tensor:
    """The token of each byte, -1 where there is none.  -> [length]"""
    widths = spans.end - spans.start
    token = torch.repeat_interleave(torch.arange(len(widths)), widths)
    place = torch.arange(len(token)) - (widths.cumsum(0) - widths)[token]
    return torch.full((length,), -1).index_put_((spans.start[token] + place,), token)


def _of_empty(source: Covered, target: Covered) -> Overlaps:
    """The parts of tokens without text."""
    giving, taking = (torch.nonzero(spans.start == spans.end)[:, 0] for spans in (source, target))
    given, taken = _places(source, giving), _places(target, taking)
    first = torch.searchsorted(taken, given)
    there = torch.searchsorted(taken, given, right=True) - first
    own = torch.searchsorted(given, given)
    here = torch.searchsorted(given, given, right=True) - own
    same = there == here
    single = giving[same], taking[(first + torch.arange(len(giving)) - own)[same]]
    shared = torch.nonzero(~same & (there > 0))[:, 0]
    owner = torch.repeat_interleave(shared, there[shared])
    within = torch.arange(len(owner)) - (there[shared].cumsum(0) - there[shared]).repeat_interleave(
        there[shared]
    )
    several = giving[owner], taking[first[owner] + within]
    alone = giving[there == 0]
    hosts = _hosts(alone, source, target)
    hosted = alone[hosts >= 0], hosts[hosts >= 0]
    share = [torch.ones(len(single[0])), 1.0 / there[owner].double(), torch.ones(len(hosted[0]))]
    one, two = (torch.cat(side) for side in zip(single, several, hosted, strict=True))
    return Overlaps(one, two, torch.cat([part.double() for part in share]))


def _places(spans: Covered, tokens: Tensor) -> Tensor:
    """A number for the place of each token, rising, different for different stretches."""
    return spans.start[tokens] + spans.part[tokens] * (1 << 40)


def _hosts(tokens: Tensor, spans: Covered, target: Covered) -> Tensor:
    """For tokens without text, the next target token with text in their stretch, or the last one; -1 if it has none."""
    texts = torch.nonzero(target.end > target.start)[:, 0]
    if not len(texts):
        return torch.full_like(tokens, -1)
    ends = target.end[texts] + target.part[texts] * (1 << 40)
    after = torch.searchsorted(ends, _places(spans, tokens), right=True)
    found = torch.full_like(tokens, -1)
    for candidate in (after - 1, after):  # the next one wins
        inside = (candidate >= 0) & (candidate < len(texts))
        token = texts[candidate.clamp(0, len(texts) - 1)]
        found = torch.where(inside & (target.part[token] == spans.part[tokens]), token, found)
    return found
