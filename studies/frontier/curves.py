"""Curves of reward against KL from stored measurements, and differences of methods at equal KL with their intervals."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from studies.frontier.runs import stored, values_file
from studies.frontier.world import best_of_kl
from tokenward.evaluation.statistics import Figure

TARGETS = (2.0, 5.0, 10.0, 20.0)
"""KL to the start at which methods are compared, nats per reply."""

RESAMPLES = 2000


class Path_(NamedTuple):
    """A training with one learning rate and seed, from the start on.

    Attributes:
        kl: ``[points, prompts]``, nats per reply.
        reward: ``[points, prompts]``.
    """

    kl: np.ndarray
    reward: np.ndarray


class Stored:
    """The measurements of a reward for some seeds, and the resamples that all methods share.

    An interval is over seeds and prompts: seeds are drawn with replacement, and for each of them its prompts. All methods of a
    seed answer the same prompts, with the same random numbers.

    Args:
        values: Folder of the measurements.
        reward: Name of the reward.
        seeds: Seeds of data and training.
        chosen_on: Seeds on which each method's learning rate was chosen for each KL; None is ``seeds``.
    """

    def __init__(
        self, values: Path, reward: str, seeds: Sequence[int], chosen_on: Sequence[int] | None = None
    ) -> None:
        self._values, self._reward, self.seeds = values, reward, list(seeds)
        self._choosing = self if chosen_on is None else Stored(values, reward, chosen_on)
        self._starts = {seed: self._read("start", seed)["0/reward"] for seed in self.seeds}

    def _read(self, arm: str, seed: int) -> dict[str, np.ndarray]:
        found = stored(values_file(self._values, self._reward, arm, seed))
        return {name: array.astype(np.float64) for name, array in found.items()}

    def has(self, arm: str) -> bool:
        """Whether an arm was measured for every seed."""
        return all(values_file(self._values, self._reward, arm, seed).exists() for seed in self.seeds)

    def paths(self, arm: str) -> dict[float, list[Path_]]:
        """For each learning rate that was measured for every seed, the trainings of the seeds."""
        read = [self._read(arm, seed) for seed in self.seeds]
        rates = {float(name.split("/")[0]) for name in read[0] if name.endswith("/reward")}
        found = dict[float, list[Path_]]()
        for rate in sorted(rates):
            if all(f"{rate:g}/reward" in one for one in read):
                found[rate] = [
                    Path_(
                        np.concatenate([np.zeros_like(self._starts[seed]), one[f"{rate:g}/kl"]]),
                        np.concatenate([self._starts[seed], one[f"{rate:g}/reward"]]),
                    )
                    for seed, one in zip(self.seeds, read, strict=True)
                ]
        return found

    @cached_property
    def _draws(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """For each resample its seeds, ``[b, seeds]``, and for each seed how often it has each prompt, ``[b, prompts]``. The first is all."""
        rng, count = np.random.default_rng(0), len(self.seeds)
        seeds = rng.integers(count, size=(RESAMPLES, count))
        seeds[0] = np.arange(count)
        shares = []
        for seed in self.seeds:
            prompts = self._starts[seed].shape[-1]
            drawn = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES)
            drawn[0] = 1
            shares.append(drawn / prompts)
        return seeds, shares

    def over(self, of_seeds: Sequence[np.ndarray]) -> np.ndarray:
        """Means over the seeds of each resample, from one array of resamples for each seed.  -> [b]"""
        seeds, _ = self._draws
        return np.take_along_axis(np.stack(of_seeds, 1), seeds, 1).mean(1)

    def resampled(self, seed: int, values: np.ndarray) -> np.ndarray:
        """Means over the prompts of each resample.  [points, prompts] -> [b, points]"""
        return self._draws[1][seed] @ values.T

    def rewards(self, arm: str, target: float) -> np.ndarray | None:
        """The arm's reward at a KL, for each resample; None if no learning rate brought it there.  -> [b]"""
        rate = self._choosing.rate_of(arm, target)
        paths = self.paths(arm)
        if rate is None or rate not in paths:
            return None
        found = [
            at(self.resampled(number, path.kl), self.resampled(number, path.reward), target)
            for number, path in enumerate(paths[rate])
        ]
        return self.over(found)

    def rate_of(self, arm: str, target: float) -> float | None:
        """The learning rate with the highest mean reward at a KL, among those with which every seed reached it."""
        means = dict[float, float]()
        for rate, paths in self.paths(arm).items():
            found = [at(path.kl.mean(1)[None], path.reward.mean(1)[None], target)[0] for path in paths]
            if not np.isnan(found).any():
                means[rate] = float(np.mean(found))
        return max(means, key=lambda rate: means[rate]) if means else None

    def best_of(self, best: Sequence[Mapping[str, Sequence[float]]], target: float) -> np.ndarray:
        """The reward of best-of-N sampling at a KL, for each resample.  -> [b]

        Args:
            best: For each seed the values of :func:`studies.frontier.world.best_of`.
            target: Nats per reply; beyond the largest N, the reward of that N.
        """
        found = []
        for number, values in enumerate(best):
            kl = np.array([best_of_kl(int(n)) for n in values])
            rewards = self.resampled(number, np.array(list(values.values())))
            found.append(at(np.tile(kl, (RESAMPLES, 1)), rewards, min(target, float(kl[-1]))))
        return self.over(found)


def at(kl: np.ndarray, reward: np.ndarray, target: float) -> np.ndarray:
    """Rewards where paths first reach a KL, between the points before and after; NaN where they do not.  [b, p], [b, p] -> [b]"""
    reached = kl >= target
    after = np.maximum(reached.argmax(1), 1)
    rows = np.arange(len(kl))
    low, high = kl[rows, after - 1], kl[rows, after]
    share = (target - low) / np.where(high > low, high - low, 1.0)
    found = reward[rows, after - 1] + share * (reward[rows, after] - reward[rows, after - 1])
    return np.where(reached.any(1), found, np.nan)


def figure(resamples: np.ndarray, count: int) -> Figure:
    """The value with its 95 % interval. Resamples that did not reach the KL are left out of the interval."""
    low, high = np.nanpercentile(resamples, [2.5, 97.5])
    return Figure(float(resamples[0]), float(low), float(high), count)
