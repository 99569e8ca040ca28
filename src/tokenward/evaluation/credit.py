"""Do the scores find the tokens that are known to carry the preference?"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tokenward.evaluation.statistics import (
    Figure,
    auroc_figure,
    mean_auroc_figure,
    mean_figure,
    precision_at_k,
)


class KnownResponse(NamedTuple):
    """A response whose tokens' true values are known, at its text tokens.

    Attributes:
        values: True value per token; positive speaks for the response, negative against it, 0 neither.
        scores: Per scorer, one number per token.
    """

    values: Sequence[float]
    scores: Mapping[str, Sequence[float]]


def credit_figures(
    responses: Sequence[KnownResponse], *, resamples: int = 2000, seed: int = 0
) -> dict[str, Figure]:
    """How well each scorer tells the tokens of known value from neutral ones.

    Per scorer: ``auroc_raising`` (tokens of positive value against neutral ones), ``auroc_lowering``
    (tokens of negative value, by the negated score), ``auroc`` (the mean of the two), ``precision_raising``
    and ``precision_lowering`` (at k = the number of such tokens in the response, mean over responses that
    have any). 0.5 is chance for an AUROC; for a precision it is the share of such tokens.
    """
    if not responses:
        return {}
    figures: dict[str, Figure] = {}
    for name in responses[0].scores:
        for figure, value in _of_scorer(responses, name, resamples=resamples, seed=seed).items():
            figures[f"credit/{figure}/{name}"] = value
    return figures


def _of_scorer(
    responses: Sequence[KnownResponse], name: str, *, resamples: int, seed: int
) -> dict[str, Figure]:
    values = np.concatenate([np.asarray(response.values, dtype=float) for response in responses])
    scores = np.concatenate([np.asarray(response.scores[name], dtype=float) for response in responses])
    example = np.repeat(np.arange(len(responses)), [len(response.values) for response in responses])
    raising, lowering, neutral = values > 0, values < 0, values == 0
    settings = {"resamples": resamples, "seed": seed}
    up, down = raising | neutral, lowering | neutral
    upward = (scores[up], raising[up], example[up])
    downward = (-scores[down], lowering[down], example[down])
    return {
        "auroc": mean_auroc_figure([upward, downward], **settings),
        "auroc_raising": auroc_figure(*upward, **settings),
        "auroc_lowering": auroc_figure(*downward, **settings),
        "precision_raising": _precision(responses, name, 1, **settings),
        "precision_lowering": _precision(responses, name, -1, **settings),
    }


def _precision(
    responses: Sequence[KnownResponse], name: str, sign: int, *, resamples: int, seed: int
) -> Figure:
    values = [
        precision_at_k(
            sign * np.asarray(response.scores[name], dtype=float),
            sign * np.asarray(response.values, dtype=float) > 0,
        )
        for response in responses
    ]
    return mean_figure([value for value in values if not np.isnan(value)], resamples=resamples, seed=seed)
