"""Win rates: a preference per prompt, its mean, and the mean at equal length."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from tokenward.evaluation.statistics import Figure, Floats, by_example, mean_figure

_PENALTY = 0.01
"""Weight of the squares in the fit: as if each coefficient were known beforehand to be 0 give or take 10."""
_STEPS = 50
_CLOSE = 1e-8


def preferences(before: Sequence[float], after: Sequence[float]) -> list[float]:
    """For each prompt 1 if the second number is higher, 0 if it is lower, 0.5 if they tie."""
    return [(b > a) + 0.5 * (b == a) for a, b in zip(before, after, strict=True)]


def win_figures(
    name: str,
    preferred: Sequence[float],
    before: Sequence[str],
    after: Sequence[str],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Figure]:
    """``win_rate`` of the second model, raw and at equal length, and the share of ``ties``.

    Args:
        name: What the figures begin with.
        preferred: 1 where the second model's reply is preferred, 0 where the first one's, between them a tie.
        before: The first model's replies.
        after: The second model's replies.
        resamples: Bootstrap draws.
        seed: Of the draws.
    """
    settings = {"resamples": resamples, "seed": seed}
    values = np.asarray(preferred, dtype=float)
    longer = [len(b) - len(a) for a, b in zip(before, after, strict=True)]
    return {
        f"{name}/win_rate": mean_figure(values, **settings),
        f"{name}/win_rate_equal_length": length_controlled(values, longer, **settings),
        f"{name}/ties": mean_figure(values == 0.5, **settings),
    }


def length_controlled(
    preferred: ArrayLike, length_difference: ArrayLike, *, resamples: int = 2000, seed: int = 0
) -> Figure:
    """Win rate that a logistic regression predicts for replies of equal length.

    ``P(win) = sigmoid(a + b tanh(d / std(d)))`` is fitted to the preferences, ``d`` being the difference in length; the
    figure is ``sigmoid(a)``, what is left at ``d = 0``. AlpacaEval 2 (arXiv 2404.04475) without its term for the
    difficulty of the instruction, which is known for its own 805 instructions only, and with a weak ridge penalty
    in the place of its cross-validated lasso.

    If all pairs differ by the same length, the figure is NaN, because length and quality cannot be told apart. If all
    replies of a pair are equally long, it is the raw win rate.

    Args:
        preferred: ``[n]`` from 0 to 1.
        length_difference: ``[n]`` length of the second reply less that of the first, in any unit.
        resamples: Bootstrap draws, over pairs.
        seed: Of the draws.
    """
    target = np.asarray(preferred, dtype=np.float64)
    difference = np.asarray(length_difference, dtype=np.float64)
    spread = float(difference.std()) if len(difference) else 0.0
    if not spread:
        if not difference.any():
            return mean_figure(target, resamples=resamples, seed=seed)
        nan = float("nan")
        return Figure(nan, nan, nan, len(target))
    features = np.stack([np.ones_like(difference), np.tanh(difference / spread)], axis=1)

    def at_equal_length(times: Floats) -> float:
        return float(_sigmoid(_fit(features, target, times))[0])

    return by_example(at_equal_length, len(target), resamples=resamples, seed=seed)


def _fit(features: Floats, target: Floats, times: Floats) -> Floats:
    """Coefficients of a ridge logistic regression by Newton's method.  [n f], [n], [n] -> [f]"""
    used = times > 0
    features, target, times = features[used], target[used], times[used]
    coefficients = np.zeros(features.shape[1])
    for _ in range(_STEPS):
        predicted = _sigmoid(features @ coefficients)
        gradient = features.T @ (times * (predicted - target)) + _PENALTY * coefficients
        curvature = (features * (times * predicted * (1 - predicted))[:, None]).T @ features
        step = np.linalg.solve(curvature + _PENALTY * np.eye(len(coefficients)), gradient)
        # A whole step can overshoot where predictions are near 0 or 1; a bounded one cannot leave the valley.
        coefficients -= np.clip(step, -1.0, 1.0)
        if np.abs(step).max() < _CLOSE:
            break
    return coefficients


def _sigmoid(values: Floats) -> Floats:
    return np.exp(-np.logaddexp(0, -values))
