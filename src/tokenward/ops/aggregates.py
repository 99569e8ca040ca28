"""From the rewards of a response's tokens to one number: the function f of TLM (arXiv 2306.00398).

Every aggregate takes values ``[n]``, weights ``[n]``, owners ``[n]`` and the number of owners. A weight says how
often the token counts; 0 removes it, even if its value is not finite, with a gradient of exactly 0. The factor C
(:func:`group_mean_length`), by which the paper multiplies all of them but the sum, is left to the caller.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenward.ops.ragged import segment_logsumexp, segment_sum, weighted_mean, weighted_sum


class Pooled(NamedTuple):
    """Segments in the place of tokens.  [s] each

    Attributes:
        values: Weighted mean of the segment's tokens; 0 where none has weight.
        weights: Mean weight of those of its tokens that have one, 0 where none has.
        owner: Which response owns the segment.
    """

    values: Tensor
    weights: Tensor
    owner: Tensor


def average(values: Tensor, weights: Tensor, owner: Tensor, count: int) -> Tensor:
    """Mean over an owner's tokens, whatever their number; NaN without weight.  [n], [n], [n] -> [count]"""
    return weighted_mean(values, weights, owner, count)


def total(values: Tensor, weights: Tensor, owner: Tensor, count: int) -> Tensor:
    """Sum over an owner's tokens, which grows with their number.  [n], [n], [n] -> [count]"""
    return weighted_sum(values, weights, owner, count)


def soft_max(
    values: Tensor,
    weights: Tensor,
    owner: Tensor,
    count: int,
    *,
    temperature: float = 2.0,
    mean: bool = False,
) -> Tensor:
    """``temperature log sum_t exp(r_t / temperature)``, between the maximum and the sum.  [n], [n], [n] -> [count]

    With equal rewards it is ``r + temperature log T``: long responses have an advantage unless ``mean`` is set.

    Args:
        values: Rewards.
        weights: How often each counts.
        owner: Which response owns the token.
        count: Number of responses. One without weight gets -inf, or NaN with ``mean``.
        temperature: > 0; towards 0 it is the maximum.
        mean: The mean of the exponentials in the place of their sum, which lies between the mean and the
            maximum and does not depend on the length.
    """
    exponent = segment_logsumexp(values / temperature, weights, owner, count)
    if mean:
        exponent = exponent - segment_sum(weights, owner, count).to(values.dtype).log()
    return temperature * exponent


def soft_min(
    values: Tensor,
    weights: Tensor,
    owner: Tensor,
    count: int,
    *,
    temperature: float = 2.0,
    mean: bool = False,
) -> Tensor:
    """``-temperature log sum_t exp(-r_t / temperature)``: :func:`soft_max` upside down.  [n], [n], [n] -> [count]

    With equal rewards it is ``r - temperature log T``: short responses have an advantage unless ``mean`` is set.
    """
    return -soft_max(-values, weights, owner, count, temperature=temperature, mean=mean)


def pooled(values: Tensor, weights: Tensor, segment: Tensor, owner: Tensor, segments: int) -> Pooled:
    """Replace tokens by the means of their segments.  [n], [n], [n], [n] -> [s] each

    Args:
        values: Rewards of tokens.
        weights: How often each counts.
        segment: Which segment the token is in; a segment lies within one response.
        owner: Which response owns the token.
        segments: Number of segments, ``s``.
    """
    weight = segment_sum(weights, segment, segments)
    tokens = segment_sum((weights != 0).to(weights.dtype), segment, segments)
    some = tokens != 0
    mean = weighted_sum(values, weights, segment, segments) / torch.where(some, weight, 1.0)
    return Pooled(
        values=mean,
        weights=weight / torch.where(some, tokens, 1.0),
        owner=owner.new_zeros(segments).scatter(0, segment, owner),
    )


def group_mean_length(lengths: Tensor, comparison: Tensor, comparisons: int) -> Tensor:
    """C of the paper: mean length of the responses of one's comparison.  [r], [r] -> [r]"""
    members = segment_sum(torch.ones_like(lengths), comparison, comparisons)
    return (segment_sum(lengths, comparison, comparisons) / members)[comparison]


AGGREGATES: dict[str, Any] = {"average": average, "sum": total, "softmax": soft_max, "softmin": soft_min}
SOFT = ("softmax", "softmin")
"""Those with a temperature."""
SCALED = ("average", *SOFT)
"""Those that the paper multiplies by C."""
