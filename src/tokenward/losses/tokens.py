"""Padded per-token values, concatenated the way :mod:`tokenward.ops` takes them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenward.errors import UserError
from tokenward.ops.logprob import wide
from tokenward.ops.ragged import position_in_group, segment_sum, weighted_sum

Pair = tuple[Tensor, Tensor]
"""One quantity for the chosen and the rejected responses."""

PAIR, ROWS, LISTS = "a pair (chosen [b t], rejected [b u])", "a tensor [b t]", "a tensor [b k t]"
_HELP = {
    PAIR: "Give one number per token. Split a tensor that holds both sides with x.chunk(2) if all chosen rows come first, or "
    "with (x[0::2], x[1::2]) if the sides alternate.",
    ROWS: "Give one number per token and one row per response.",
    LISTS: "Give one number per token. If the k responses of a prompt are consecutive rows, use x.view(b, k, -1).",
}


def padded(values: Tensor, response: Tensor, responses: int) -> Tensor:
    """Turn concatenated values into one row per response, padded with 0.  [n], [n] -> [r t]

    If the two responses of a pair are neighbors, ``rows[0::2]`` and ``rows[1::2]`` are its two sides.

    Args:
        values: One value per token: log-probabilities, weights or anything else.
        response: Index of the response that owns each token, starting at 0.
        responses: Number of responses.

    Raises:
        UserError: ``values`` and ``response`` are not 1-D tensors of one shape, or an index is out of range.
    """
    if values.shape != response.shape or values.ndim != 1:
        raise UserError(
            f"values and response must have the same shape [n], got {[*values.shape]} and {[*response.shape]}. Concatenate "
            "the tokens of all responses, and give the index of its response for each token.",
            code="wrong-shape",
        )
    integers = not (response.is_floating_point() or response.dtype == torch.bool)
    if not integers or bool(((response < 0) | (response >= responses)).any()):
        raise UserError(
            f"response must have integers from 0 to {responses - 1}: the index of the response that owns each token.",
            code="out-of-range",
        )
    place = position_in_group(response)
    width = int(place.max()) + 1 if len(place) else 0
    return values.new_zeros(responses, width).index_put((response, place), values)


class Tokens:
    """Padded tokens of a loss, concatenated.

    Args:
        logp: Log-probabilities, or whatever else the loss differentiates.
        weights: Weights of the same tokens.
        form: The form that all values must have: ``PAIR``, ``ROWS`` or ``LISTS``.
        name: What the loss calls ``logp``.
        scales: Settings that must be greater than 0.

    Attributes:
        logp: ``[n]``, 0 at tokens without weight.
        weights: ``[n]``.
        response: ``[n]``, the response that owns each token. The responses of a comparison are neighbors.
        comparison: ``[r]``, the comparison that owns each response.
        comparisons: ``b``.
        responses: ``r``.

    Raises:
        UserError: A value has the wrong shape, or a scale is not positive.
    """

    def __init__(
        self, logp: Tensor | Pair, weights: Tensor | Pair, form: str, *, name: str = "logp", **scales: float
    ) -> None:
        check_positive(**scales)
        rows = _rows(name, logp, form)
        if len({len(row) for row in rows}) > 1:
            raise UserError(
                f"{name} has {len(rows[0])} chosen and {len(rows[1])} rejected responses. Give one of each per pair.",
                code="wrong-shape",
            )
        self._name, self._form, self._shapes = name, form, [row.shape for row in rows]
        self._width, self._dtype = max(row.shape[1] for row in rows), wide(rows[0]).dtype
        self.comparisons, self.responses = len(rows[0]), len(rows[0]) * len(rows)
        place = torch.arange(self.responses, device=rows[0].device)
        self.response, self.comparison = place.repeat_interleave(self._width), place // len(rows)
        # `flatten` reads the weights: they start at one so that their own values pass unchanged.
        self.weights = torch.ones_like(self.response, dtype=self._dtype)
        self.weights = self.flatten("weights", weights)
        self.logp = self.flatten(name, logp)

    def flatten(self, name: str, values: Tensor | Pair) -> Tensor:
        """One value per token in the order of the responses, 0 at tokens without weight.  -> [n]"""
        rows = _rows(name, values, self._form)
        for place, (row, shape) in enumerate(zip(rows, self._shapes, strict=True)):
            side = f"[{place}]" if self._form == PAIR else ""
            check_shape(f"{name}{side}", row, shape, f"one number for each token of {self._name}{side}")
        wide_rows = [F.pad(row.to(self._dtype), (0, self._width - row.shape[1])) for row in rows]
        # `where` instead of a product: 0 times NaN would be NaN, in the value and in the gradient.
        return torch.where(self.weights != 0, torch.stack(wide_rows, 1).flatten(), 0.0)

    def log_ratio(self, reference: Tensor | Pair) -> Tensor:
        """``log pi - log pi_ref`` of each token.  -> [n]"""
        return self.logp - self.flatten("reference", reference)

    @property
    def signs(self) -> Tensor:
        """1 for tokens of chosen responses, -1 for tokens of rejected ones.  -> [n]"""
        return (1 - 2 * (self.response % 2)).to(self._dtype)

    def sum(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sum over each response with its weights, or with others.  [n] -> [r]"""
        weights = self.weights if weights is None else weights
        return weighted_sum(values, weights, self.response, self.responses)

    def sizes(self, weights: Tensor) -> Tensor:
        """Sum of the absolute weights of each response.  [n] -> [r]"""
        return segment_sum(weights.abs(), self.response, self.responses)

    def mean(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """Weighted sum over the sum of the absolute weights.  [n] -> [r]"""
        weights = self.weights if weights is None else weights
        # A signed sum in the denominator would flip the sign of a response whose weights are negative.
        return self.sum(values, weights) / self.sizes(weights)

    def sides(self, per_response: Tensor) -> Pair:
        """Split values of responses into chosen and rejected.  [2 b] -> [b], [b]"""
        return per_response[0::2], per_response[1::2]


def _rows(name: str, values: Tensor | Pair, form: str) -> list[Tensor]:
    """One tensor ``[b t]`` for each response of a comparison."""
    if isinstance(values, Tensor):
        got, fits = f"a tensor {[*values.shape]}", values.ndim == {ROWS: 2, LISTS: 3}.get(form)
    else:
        got = f"tensors {', '.join(str([*side.shape]) for side in values)}"
        fits = form == PAIR and len(values) == 2 and all(side.ndim == 2 for side in values)
    if not fits:
        raise UserError(f"{name} is {got}, but this loss takes {form}. {_HELP[form]}", code="wrong-shape")
    if not isinstance(values, Tensor):
        return [*values]
    return [values] if form == ROWS else [*values.unbind(1)]


def check_numbers(low: float = -math.inf, high: float = math.inf, **settings: float) -> None:
    """Refuse settings that are not one finite number in [low, high]; a tensor of several would broadcast the loss."""
    for name, value in settings.items():
        if isinstance(value, Tensor) and value.ndim:
            raise UserError(
                f"{name} has the shape {[*value.shape]}. Give one number for all comparisons.",
                code="wrong-shape",
            )
        if not (low <= value <= high and math.isfinite(value)):
            wanted = (
                f"in [{low:g}, {high:g}]"
                if high < math.inf
                else f">= {low:g}"
                if low > -math.inf
                else "finite"
            )
            raise UserError(f"{name} must be {wanted}, got {value}.", code="out-of-range")


def check_positive(**settings: float) -> None:
    """Refuse settings that are not one finite number > 0."""
    check_numbers(**settings)
    for name, value in settings.items():
        if not value > 0:
            raise UserError(
                f"{name} must be greater than 0, got {value}. Use for example {name}=0.1.",
                code="out-of-range",
            )


def check_shape(name: str, values: Tensor, shape: torch.Size, what: str) -> None:
    """Raise a :class:`UserError` if ``values`` does not have this shape."""
    if values.shape != shape:
        raise UserError(
            f"{name} has the shape {[*values.shape]}. Give {what}: {[*shape]}.", code="wrong-shape"
        )
