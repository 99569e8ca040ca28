"""Token credit: do scores find the tokens that carry the preference, and do two selections agree?"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from tokenward.errors import UserError
from tokenward.evaluation.statistics import (
    Figure,
    LabelledScores,
    mean_figure,
    precision_at_k,
    ranking_figure,
)
from tokenward.ops.selection import top_fraction
from tokenward.tokens.spans import ByteSpan, span_values
from tokenward.types import Span

Scores = Mapping[str, Sequence[float]]
"""One score per token of each response, by the response's key."""


def jaccard(first: ArrayLike, second: ArrayLike) -> float:
    """Size of the intersection of two selections over the size of their union; NaN if both are empty.

    Args:
        first: ``[n]`` bool, whether each token of a response is selected.
        second: ``[n]`` bool, the other selection.
    """
    one, other = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    either = int((one | other).sum())
    return float((one & other).sum() / either) if either else float("nan")


def kappa(first: ArrayLike, second: ArrayLike) -> float:
    """Cohen's kappa, agreement beyond chance: 1 for equal selections, 0 for independent ones. NaN if both are all or nothing.

    Args:
        first: ``[n]`` bool, whether each token of a response is selected.
        second: ``[n]`` bool, the other selection.
    """
    one, other = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if not len(one):
        return float("nan")
    agreed = float((one == other).mean())
    chance = float(one.mean() * other.mean() + (~one).mean() * (~other).mean())
    return (agreed - chance) / (1 - chance) if chance < 1 else float("nan")


def selected(scores: Sequence[float], fraction: float, *, top: bool) -> NDArray[np.bool_]:
    """The tokens that SePO's rule selects: the highest or lowest fraction, at least one, the earliest of equal scores.

    Args:
        scores: ``[n]``.
        fraction: Fraction to select, in (0, 1].
        top: Select the highest scores, as for chosen responses; False selects the lowest, as for rejected ones.
    """
    values = torch.as_tensor(scores, dtype=torch.float32)
    group = torch.zeros(len(values), dtype=torch.long)
    return top_fraction(values if top else -values, group, 1, fraction).numpy()


def stability_figures(
    first: Scores, second: Scores, *, fraction: float, resamples: int = 2000, seed: int = 0
) -> dict[str, Figure]:
    """Agreement of two scorings on the tokens to select, over the responses that both contain.

    ``jaccard/top`` and ``kappa/top`` compare the highest fraction of every response, as it is selected from chosen
    responses, ``jaccard/bottom`` and ``kappa/bottom`` the lowest. Means over responses; the bootstrap draws responses.

    Args:
        first: Scores of one run.
        second: Scores of another run.
        fraction: Fraction of the tokens to select.
        resamples: Number of bootstrap draws.
        seed: Seed of the draws.

    Raises:
        UserError: they have no response in common, or the same response with other tokens.
    """
    keys = [key for key in first if key in second]
    if not keys:
        raise UserError(
            f"the two scorings, of {len(first)} and {len(second)} responses, have no response in common. Compare scores of the same data.",
            code="nothing-in-common",
        )
    for key in keys:
        if len(first[key]) != len(second[key]):
            raise UserError(
                f"response {key} has {len(first[key])} tokens in one scoring and {len(second[key])} in the other. Compare scores of models "
                "with the same tokenizer.",
                code="tokenizer-mismatch",
            )
    figures = {}
    for side in ("top", "bottom"):
        pairs = [
            tuple(selected(scores[key], fraction, top=side == "top") for scores in (first, second))
            for key in keys
        ]
        for name, overlap in (("jaccard", jaccard), ("kappa", kappa)):
            known = [value for value in (overlap(*pair) for pair in pairs) if not np.isnan(value)]
            figures[f"{name}/{side}"] = mean_figure(known, resamples=resamples, seed=seed)
    return figures


class KnownResponse(NamedTuple):
    """A response whose tokens have known values; tokens without text are left out.

    Attributes:
        values: True value per token; positive for the response, negative against it, 0 neutral.
        scores: One number per token, by scorer.
    """

    values: Sequence[float]
    scores: Mapping[str, Sequence[float]]


def known_response(
    text: str, spans: Sequence[Span], tokens: Sequence[ByteSpan], scores: Mapping[str, Sequence[float]]
) -> KnownResponse:
    """Map character spans of known value to the scored tokens.

    Args:
        text: The response.
        spans: Spans with a known value; all other characters have value 0.
        tokens: ``[n]``, the byte range of each token; an empty range, such as that of the end-of-turn token, is left out.
        scores: ``[n]``, by scorer.
    """
    of_text = [index for index, token in enumerate(tokens) if token.end > token.start]
    values = span_values(spans, text, tokens)
    return KnownResponse(
        [values[index] for index in of_text],
        {name: [mine[index] for index in of_text] for name, mine in scores.items()},
    )


def credit_figures(
    responses: Sequence[KnownResponse], *, at: Sequence[int] = (), resamples: int = 2000, seed: int = 0
) -> dict[str, Figure]:
    """How well each scorer separates the tokens of known value from neutral ones.

    For each scorer: ``auroc_raising`` (tokens of positive value against neutral ones), ``auroc_lowering`` (tokens of negative
    value, by the negated score), ``auroc`` (the mean of both), the same three of ``average_precision``, and
    ``precision_raising`` and ``precision_lowering`` (at k = the number of such tokens in the response, mean over responses
    that have any). Chance is 0.5 for an AUROC, and the share of such tokens for the others. The bootstrap draws responses.

    Args:
        responses: Responses with the same scorers.
        at: Further k, each at most a response's length, for ``precision_at_5_raising`` and so on.
        resamples: Number of bootstrap draws.
        seed: Seed of the draws.
    """
    return repeated_credit_figures([responses], at=at, resamples=resamples, seed=seed)


def repeated_credit_figures(
    repeats: Sequence[Sequence[KnownResponse]],
    *,
    at: Sequence[int] = (),
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Figure]:
    """Means of :func:`credit_figures` over several scorings of the same responses, such as those of several training seeds.

    A bootstrap draw takes the same responses in every scoring. So ``n`` is the number of responses, and the interval does not
    cover further seeds.

    Args:
        repeats: The responses of each scoring, in the same order.
        at: As in :func:`credit_figures`.
        resamples: Number of bootstrap draws.
        seed: Seed of the draws.
    """
    if not repeats or not repeats[0]:
        return {}
    figures: dict[str, Figure] = {}
    settings = {"resamples": resamples, "seed": seed}
    for name in repeats[0][0].scores:
        up, down = ([_labelled(responses, name, sign) for responses in repeats] for sign in (1, -1))
        for figure in ("auroc", "average_precision"):
            for side, labelled in (("", up + down), ("_raising", up), ("_lowering", down)):
                figures[f"credit/{figure}{side}/{name}"] = ranking_figure(figure, labelled, **settings)
        for side, sign in (("raising", 1), ("lowering", -1)):
            for k in (None, *at):
                figure = "precision" if k is None else f"precision_at_{k}"
                values = _precisions(repeats, name, sign, k)
                figures[f"credit/{figure}_{side}/{name}"] = mean_figure(values, **settings)
    return figures


def _labelled(responses: Sequence[KnownResponse], name: str, sign: int) -> LabelledScores:
    """Scores of the tokens of one sign and of the neutral ones, which of them are of that sign, and their responses."""
    values = sign * np.concatenate([np.asarray(response.values, dtype=float) for response in responses])
    scores = sign * np.concatenate([np.asarray(response.scores[name], dtype=float) for response in responses])
    example = np.repeat(np.arange(len(responses)), [len(response.values) for response in responses])
    compared = values >= 0
    return scores[compared], values[compared] > 0, example[compared]


def _precisions(
    repeats: Sequence[Sequence[KnownResponse]], name: str, sign: int, k: int | None
) -> list[float]:
    """Mean precision of each response over the repeats, without those that are NaN."""
    values = [
        np.mean(
            [
                precision_at_k(sign * np.asarray(one.scores[name]), sign * np.asarray(one.values) > 0, k)
                for one in same
            ]
        )
        for same in zip(*repeats, strict=True)
    ]
    return [float(value) for value in values if not np.isnan(value)]
