"""Do scores find the tokens that are known to carry the preference, and do two selections agree?"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from tokenward.errors import UserError
from tokenward.evaluation.statistics import (
    Figure,
    LabelledScores,
    mean_auroc_figure,
    mean_average_precision_figure,
    mean_figure,
    precision_at_k,
)
from tokenward.ops.selection import top_fraction
from tokenward.tokens.spans import ByteSpan, span_values
from tokenward.types import Span

Scores = Mapping[str, Sequence[float]]
"""Per response, by its key, one score per token."""


def jaccard(first: ArrayLike, second: ArrayLike) -> float:
    """Share of the tokens selected by either that both selected; NaN if neither selected any.

    Args:
        first: ``[n]`` bool, whether each token of a response is selected.
        second: ``[n]`` bool, likewise.
    """
    one, other = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    either = int((one | other).sum())
    return float((one & other).sum() / either) if either else float("nan")


def kappa(first: ArrayLike, second: ArrayLike) -> float:
    """Agreement over chance (Cohen's kappa): 1 is the same tokens, 0 what two random selections of these sizes share.

    NaN if both select every token, or none.

    Args:
        first: ``[n]`` bool, whether each token of a response is selected.
        second: ``[n]`` bool, likewise.
    """
    one, other = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if not len(one):
        return float("nan")
    agreed = float((one == other).mean())
    chance = float(one.mean() * other.mean() + (~one).mean() * (~other).mean())
    return (agreed - chance) / (1 - chance) if chance < 1 else float("nan")


def selected(scores: Sequence[float], fraction: float, *, top: bool) -> NDArray[np.bool_]:
    """The tokens of a response that SePO's rule keeps: its best or worst share, at least one, the earliest of a tie.

    Args:
        scores: ``[n]``.
        fraction: Share to keep, in (0, 1].
        top: Keep the best, as SePO does for chosen responses; otherwise the worst, as for rejected ones.
    """
    values = torch.as_tensor(scores, dtype=torch.float32)
    group = torch.zeros(len(values), dtype=torch.long)
    return top_fraction(values if top else -values, group, 1, fraction).numpy()


def stability_figures(
    first: Scores, second: Scores, *, fraction: float, resamples: int = 2000, seed: int = 0
) -> dict[str, Figure]:
    """How much two scorings agree on the tokens to select, over the responses that both hold.

    ``jaccard/top`` and ``kappa/top`` compare the best share of every response, as selected from chosen responses;
    ``jaccard/bottom`` and ``kappa/bottom`` the worst share. Means over responses, with intervals that draw responses.

    Args:
        first: Scores of one run.
        second: Scores of another.
        fraction: Share of the tokens to select.
        resamples: Bootstrap draws.
        seed: Of the draws.

    Raises:
        UserError: they hold no response in common, or other tokens of the same one.
    """
    keys = [key for key in first if key in second]
    if not keys:
        raise UserError(
            f"the two scorings, of {len(first)} and {len(second)} responses, have no response in common. Compare scores of the same data."
        )
    for key in keys:
        if len(first[key]) != len(second[key]):
            raise UserError(
                f"response {key} has {len(first[key])} tokens in one scoring and {len(second[key])} in the other, so their selections "
                "cannot be compared. Compare scores by models with the same tokenizer."
            )
    figures = {}
    for side in ("top", "bottom"):
        pairs = [
            tuple(selected(scores[key], fraction, top=side == "top") for scores in (first, second))
            for key in keys
        ]
        for name, overlap in (("jaccard", jaccard), ("kappa", kappa)):
            values = [overlap(*pair) for pair in pairs]
            known = [value for value in values if not np.isnan(value)]
            figures[f"{name}/{side}"] = mean_figure(known, resamples=resamples, seed=seed)
    return figures


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
