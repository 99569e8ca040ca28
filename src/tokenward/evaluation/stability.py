"""Overlap of two selections: do another seed, precision or batch select the same tokens?"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from tokenward.errors import UserError
from tokenward.evaluation.statistics import Figure, mean_figure
from tokenward.ops.selection import top_fraction

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
