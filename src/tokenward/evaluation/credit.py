"""Do the scores find the tokens that are known to carry the preference?"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tokenward.evaluation.statistics import (
    Figure,
    LabelledScores,
    mean_auroc_figure,
    mean_average_precision_figure,
    mean_figure,
    precision_at_k,
)
from tokenward.tokens.spans import ByteSpan, span_values
from tokenward.types import Span


class KnownResponse(NamedTuple):
    """A response whose tokens' true values are known, at its text tokens.

    Attributes:
        values: True value per token; positive speaks for the response, negative against it, 0 neither.
        scores: Per scorer, one number per token.
    """

    values: Sequence[float]
    scores: Mapping[str, Sequence[float]]


def known_response(
    text: str, spans: Sequence[Span], tokens: Sequence[ByteSpan], scores: Mapping[str, Sequence[float]]
) -> KnownResponse:
    """Character spans of known value, brought to the tokens that were scored.

    Args:
        text: The response.
        spans: Its characters of known value; all others have value 0.
        tokens: ``[n]``, the bytes of each token; those that are no text, such as the end of turn, are left out.
        scores: Per scorer, ``[n]``.
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
    """How well each scorer tells the tokens of known value from neutral ones.

    Per scorer: ``auroc_raising`` (tokens of positive value against neutral ones), ``auroc_lowering``
    (tokens of negative value, by the negated score), ``auroc`` (the mean of the two), the same three of
    ``average_precision``, and ``precision_raising`` and ``precision_lowering`` (at k = the number of such tokens
    in the response, mean over responses that have any). 0.5 is chance for an AUROC; for the others it is the
    share of such tokens. Every interval draws whole responses.

    Args:
        responses: With the same scorers each.
        at: Further k, each at most a response's length: ``precision_at_5_raising`` and so on.
        resamples: Bootstrap draws.
        seed: Of the draws.
    """
    return repeated_credit_figures([responses], at=at, resamples=resamples, seed=seed)


def repeated_credit_figures(
    repeats: Sequence[Sequence[KnownResponse]],
    *,
    at: Sequence[int] = (),
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Figure]:
    """Means over several scorings of the same responses, such as those of several training seeds.

    A draw of the interval takes the same responses in every repeat, so ``n`` stays the number of responses, and
    the interval says nothing about further seeds.

    Args:
        repeats: The responses of each scoring, in one order; otherwise as :func:`credit_figures`.
        at: See there.
        resamples: See there.
        seed: See there.
    """
    if not repeats or not repeats[0]:
        return {}
    figures: dict[str, Figure] = {}
    settings = {"resamples": resamples, "seed": seed}
    for name in repeats[0][0].scores:
        found = _rankings(repeats, name, **settings)
        for side, sign in (("raising", 1), ("lowering", -1)):
            for k in (None, *at):
                figure = "precision" if k is None else f"precision_at_{k}"
                found[f"{figure}_{side}"] = _precision(repeats, name, sign, k, **settings)
        figures |= {f"credit/{figure}/{name}": value for figure, value in found.items()}
    return figures


def _rankings(
    repeats: Sequence[Sequence[KnownResponse]], name: str, *, resamples: int, seed: int
) -> dict[str, Figure]:
    """AUROC and average precision over the tokens of all responses."""
    up = [_labelled(responses, name, 1) for responses in repeats]
    down = [_labelled(responses, name, -1) for responses in repeats]
    return {
        f"{figure}{side}": measure(labelled, resamples=resamples, seed=seed)
        for figure, measure in (
            ("auroc", mean_auroc_figure),
            ("average_precision", mean_average_precision_figure),
        )
        for side, labelled in (("", up + down), ("_raising", up), ("_lowering", down))
    }


def _labelled(responses: Sequence[KnownResponse], name: str, sign: int) -> LabelledScores:
    """The tokens of one sign and the neutral ones: their scores, which they are, and whose."""
    values = sign * np.concatenate([np.asarray(response.values, dtype=float) for response in responses])
    scores = sign * np.concatenate([np.asarray(response.scores[name], dtype=float) for response in responses])
    example = np.repeat(np.arange(len(responses)), [len(response.values) for response in responses])
    asked = values >= 0
    return scores[asked], values[asked] > 0, example[asked]


def _precision(
    repeats: Sequence[Sequence[KnownResponse]],
    name: str,
    sign: int,
    k: int | None,
    *,
    resamples: int,
    seed: int,
) -> Figure:
    values = [
        np.mean([_precision_of(response, name, sign, k) for response in same])
        for same in zip(*repeats, strict=True)
    ]
    return mean_figure([value for value in values if not np.isnan(value)], resamples=resamples, seed=seed)


def _precision_of(response: KnownResponse, name: str, sign: int, k: int | None) -> float:
    scores, values = (
        np.asarray(numbers, dtype=float) for numbers in (response.scores[name], response.values)
    )
    return precision_at_k(sign * scores, sign * values > 0, k)
