"""Held-out pairs: does the policy prefer what people preferred, and at what price?"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tokenward.evaluation.statistics import Figure, mean_figure


class PairLogprobs(NamedTuple):
    """Per-token log-probabilities of one pair, the better response first, end-of-turn token included.

    Attributes:
        start: Under the model before training.
        policy: Under the model after training.
    """

    start: tuple[Tensor, Tensor]
    policy: tuple[Tensor, Tensor]


def preference_figures(
    pairs: Sequence[PairLogprobs], *, resamples: int = 2000, seed: int = 0
) -> dict[str, Figure]:
    """Accuracy, margin and displacement on held-out pairs: means of :func:`preference_values`."""
    values = preference_values(pairs)
    return {name: mean_figure(value, resamples=resamples, seed=seed) for name, value in values.items()}


def preference_values(pairs: Sequence[PairLogprobs]) -> dict[str, NDArray[np.float64]]:
    """Accuracy, margin and displacement of each held-out pair, by the figure's name.  -> [pairs] each

    ``accuracy`` and ``margin`` (nats) use the log-ratio of the policy to its start, summed over tokens:
    the implicit reward, 0 for every pair before training. The ``likelihood`` figures use the mean
    log-probability per token, before and after. ``logps/*`` tell what training did to the likelihood of
    each side: chosen responses that became less likely than they were are displaced.
    """
    start = np.array([[float(side.sum()) for side in pair.start] for pair in pairs]).reshape(-1, 2)
    after = np.array([[float(side.sum()) for side in pair.policy] for pair in pairs]).reshape(-1, 2)
    length = np.array([[len(side) for side in pair.start] for pair in pairs]).reshape(-1, 2)
    change = after - start
    margin = change[:, 0] - change[:, 1]
    before_gap = start[:, 0] / length[:, 0] - start[:, 1] / length[:, 1]
    after_gap = after[:, 0] / length[:, 0] - after[:, 1] / length[:, 1]
    values = {
        "preference/accuracy": (margin > 0) + 0.5 * (margin == 0),
        "preference/margin": margin,
        "likelihood/accuracy_before": before_gap > 0,
        "likelihood/accuracy_after": after_gap > 0,
        "likelihood/margin_before": before_gap,
        "likelihood/margin_after": after_gap,
        "logps/chosen_change": change[:, 0],
        "logps/rejected_change": change[:, 1],
        "logps/chosen_change_per_token": change[:, 0] / length[:, 0],
        "logps/rejected_change_per_token": change[:, 1] / length[:, 1],
    }
    return {name: np.asarray(value, dtype=np.float64) for name, value in values.items()}


def unpaired_values(
    start: Sequence[Tensor], policy: Sequence[Tensor], good: Sequence[bool]
) -> dict[str, tuple[list[int], NDArray[np.float64]]]:
    """How training changed the likelihood of unpaired eval responses, the good ones and the bad ones.

    Args:
        start: ``[len]`` each, log-probabilities of a response's tokens before training.
        policy: The same after training.
        good: Which responses are good.

    Returns:
        For each figure, the indices of its responses and their changes in nats, summed over tokens. A figure without
        responses is left out.
    """
    change = np.array(
        [float(after.sum() - before.sum()) for before, after in zip(start, policy, strict=True)]
    )
    sides = {"unpaired/good_change": True, "unpaired/bad_change": False}
    places = {name: [i for i, own in enumerate(good) if own == side] for name, side in sides.items()}
    return {name: (found, change[found]) for name, found in places.items() if found}
