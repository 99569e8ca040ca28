"""Aggregates of token rewards to one number per response: the function f of TLM (arXiv 2306.00398).

Every aggregate takes values ``[n]``, weights ``[n]``, owners ``[n]`` and the number of owners. A weight is the number of
times that a token counts. A weight of 0 removes the token: its value may be infinite or NaN, and its gradient is 0. The
caller applies the factor C (:func:`group_mean_length`), which the paper multiplies with all of them except the sum.
"""

from typing import Any

import torch
from torch import Tensor

from tokenward.ops.ragged import segment_logsumexp, segment_sum, weighted_mean, weighted_sum


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

    For equal rewards this is ``r + temperature log T``, which favors long responses. With ``mean``, the mean of the
    exponentials instead of their sum, the result lies between mean and maximum and does not depend on the length. The
    limit at temperature 0 is the maximum. A response without weight gets -inf, or NaN with ``mean``.
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
    """``-temperature log sum_t exp(-r_t / temperature)``.  [n], [n], [n] -> [count]

    For equal rewards this is ``r - temperature log T``, which favors short responses unless ``mean`` is set. See
    :func:`soft_max`.
    """
    return -soft_max(-values, weights, owner, count, temperature=temperature, mean=mean)


def pooled(
    values: Tensor, weights: Tensor, segment: Tensor, owner: Tensor, segments: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace the tokens of each segment by one value.  [n], [n], [n], [n] -> [s], [s], [s]

    A segment lies within one response. ``owner`` is the response of each token.

    Returns:
        For each segment the weighted mean of its values, the mean of its nonzero weights, and the response that owns
        it. Mean and weight are 0 for a segment without weight.
    """
    weight = segment_sum(weights, segment, segments)
    tokens = segment_sum((weights != 0).to(weights.dtype), segment, segments)
    some = tokens != 0
    mean = weighted_sum(values, weights, segment, segments) / torch.where(some, weight, 1.0)
    owners = owner.new_zeros(segments).scatter(0, segment, owner)
    return mean, weight / torch.where(some, tokens, 1.0), owners


def group_mean_length(lengths: Tensor, comparison: Tensor, comparisons: int) -> Tensor:
    """C of the paper: the mean length of the responses of each response's comparison.  [r], [r] -> [r]"""
    members = segment_sum(torch.ones_like(lengths), comparison, comparisons)
    return (segment_sum(lengths, comparison, comparisons) / members)[comparison]


AGGREGATES: dict[str, Any] = {
    "average": weighted_mean, "sum": weighted_sum, "softmax": soft_max, "softmin": soft_min,
}  # fmt: skip
SOFT = ("softmax", "softmin")
"""Aggregates with a temperature."""
SCALED = ("average", *SOFT)
"""Aggregates that the paper multiplies by C."""
