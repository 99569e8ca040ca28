"""Padded per-token values as :mod:`tokenward.ops` takes them: end to end, with the response that owns each token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenward.errors import UserError
from tokenward.ops.logprob import wide
from tokenward.ops.ragged import position_in_group, segment_sum, weighted_sum

Pair = tuple[Tensor, Tensor]
"""The same quantity of the chosen and of the rejected responses."""

PAIR, ROWS, LISTS = "a pair (chosen [b t], rejected [b u])", "a tensor [b t]", "a tensor [b k t]"
_HELP = {
    PAIR: "Give one number per token. A tensor of both sides is x.chunk(2) if all chosen rows come first, and (x[0::2], x[1::2]) "
    "if they alternate.",
    ROWS: "Give one number per token, one row per response.",
    LISTS: "Give one number per token. Rows that hold the k responses of a prompt one after another are x.view(b, k, -1).",
}


def padded(values: Tensor, response: Tensor, responses: int) -> Tensor:
    """One row per response of values that lie end to end, 0 behind its last token.  [n], [n] -> [r t]

    If the responses of a pair follow each other, ``rows[0::2], rows[1::2]`` are its two sides.

    Args:
        values: Of the tokens: log-probabilities, weights, or anything else.
        response: Which response owns each token, from 0.
        responses: How many there are.

    Raises:
        UserError: the two have different shapes.
    """
    if values.shape != response.shape or values.ndim != 1:
        raise UserError(
            f"padded takes values and response of one shape [n], got {[*values.shape]} and {[*response.shape]}. Give the tokens of "
            "all responses in one row, and the number of its response for each."
        )
    place = position_in_group(response)
    width = int(place.max()) + 1 if len(place) else 0
    return values.new_zeros(responses, width).index_put((response, place), values)


class Tokens:
    """Padded tokens laid end to end; made by :func:`tokens_of`.

    Attributes:
        logp: ``[n]``, 0 at tokens without weight.
        weights: ``[n]``.
        response: ``[n]``, which response owns the token; those of a comparison follow each other.
        comparison: ``[r]``, which comparison owns the response.
        comparisons: ``b``.
        responses: ``r``.
    """

    def __init__(self, logp: Tensor | Pair, weights: Tensor | Pair, form: str, name: str) -> None:
        rows = _rows(name, logp, form)
        if len({len(row) for row in rows}) > 1:
            raise UserError(
                f"{name} has {len(rows[0])} chosen and {len(rows[1])} rejected responses. Give one of each per pair."
            )
        self._name, self._form, self._shapes = name, form, [row.shape for row in rows]
        self._width, self._dtype = max(row.shape[1] for row in rows), wide(rows[0]).dtype
        self.comparisons, self.responses = len(rows[0]), len(rows[0]) * len(rows)
        place = torch.arange(self.responses, device=rows[0].device)
        self.response, self.comparison = place.repeat_interleave(self._width), place // len(rows)
        self.weights = torch.ones_like(self.response, dtype=self._dtype)
        self.weights = self.lay("weights", weights)
        self.logp = self.lay(name, logp)

    def lay(self, name: str, values: Tensor | Pair) -> Tensor:
        """A value of the tokens in the order of the responses, 0 at tokens without weight.  -> [n]"""
        rows = _rows(name, values, self._form)
        for place, (row, shape) in enumerate(zip(rows, self._shapes, strict=True)):
            of = f"[{place}]" if self._form == PAIR else ""
            check_shape(f"{name}{of}", row, shape, f"one number for each token of {self._name}{of}")
        wide_rows = [F.pad(row.to(self._dtype), (0, self._width - row.shape[1])) for row in rows]
        return torch.where(self.weights != 0, torch.stack(wide_rows, 1).flatten(), 0.0)

    @property
    def signs(self) -> Tensor:
        """1 for a token of the chosen response, -1 for one of the rejected.  -> [n]"""
        return (1 - 2 * (self.response % 2)).to(self._dtype)

    def sum(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """Over each response, with its weights or others.  [n] -> [r]"""
        weights = self.weights if weights is None else weights
        return weighted_sum(values, weights, self.response, self.responses)

    def sizes(self, weights: Tensor) -> Tensor:
        """What a weighted mean is divided by: a sum of negative weights would turn every sign round.  [n] -> [r]"""
        return segment_sum(weights.abs(), self.response, self.responses)

    def mean(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """The sum over the sum of the weights' sizes.  [n] -> [r]"""
        weights = self.weights if weights is None else weights
        return self.sum(values, weights) / self.sizes(weights)

    def sides(self, per_response: Tensor) -> Pair:
        """[2 b] -> [b], [b]"""
        return per_response[0::2], per_response[1::2]


def tokens_of(
    logp: Tensor | Pair, weights: Tensor | Pair, form: str, *, name: str = "logp", **scales: float
) -> Tokens:
    """The tokens of a loss, laid end to end.

    Args:
        logp: Log-probabilities, or whatever a gradient goes to.
        weights: Of the same tokens.
        form: What both must be: one of ``PAIR``, ``ROWS`` and ``LISTS``.
        name: What the loss calls ``logp``.
        scales: Settings that must be greater than 0.

    Raises:
        UserError: one of them is not.
    """
    for setting, value in scales.items():
        if not value > 0:
            raise UserError(
                f"{setting} must be greater than 0, got {value}. Write for example {setting}=0.1."
            )
    return Tokens(logp, weights, form, name)


def _rows(name: str, values: Tensor | Pair, form: str) -> list[Tensor]:
    """Values of tokens as one tensor ``[b t]`` for each response of a comparison."""
    if isinstance(values, Tensor):
        got, fits = f"a tensor {[*values.shape]}", values.ndim == {ROWS: 2, LISTS: 3}.get(form)
    else:
        got = f"tensors {', '.join(str([*side.shape]) for side in values)}"
        fits = form == PAIR and len(values) == 2 and all(side.ndim == 2 for side in values)
    if not fits:
        raise UserError(f"{name} is {got}, and this loss takes {form}. {_HELP[form]}")
    if not isinstance(values, Tensor):
        return [*values]
    return [values] if form == ROWS else [*values.unbind(1)]


def check_shape(name: str, values: Tensor, shape: torch.Size, what: str) -> None:
    """Refuse a value of another shape.

    Raises:
        UserError: it has one.
    """
    if values.shape != shape:
        raise UserError(f"{name} has the shape {[*values.shape]}. Give {what}: {[*shape]}.")
