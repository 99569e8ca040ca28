"""Curves of reward against KL from stored measurements, and differences of methods at equal KL with their intervals."""

import json
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from studies.arms import START
from studies.frontier.arms import ARMS
from studies.frontier.runs import stored, values_file
from studies.frontier.world import best_of_kl
from tokenward.evaluation.statistics import Figure

TARGETS = (0.5, 2.0, 5.0, 10.0, 20.0)
"""KL to the start at which methods are compared, nats per reply."""

RESAMPLES = 2000


class Resampled(NamedTuple):
    """A training with one learning rate and seed, from the start on, as means over the prompts of each resample.

    Attributes:
        kl: ``[b, points]``, nats per reply; of an end ``[b]``.
        reward: ``[b, points]``; of an end ``[b]``.
    """

    kl: np.ndarray
    reward: np.ndarray


class Gain(NamedTuple):
    """An arm's reward minus another's at the same KL.

    Attributes:
        gain: ``[b]``.
        measured: Whether the other is read between measured points.
    """

    gain: np.ndarray
    measured: bool


class Measured:
    """The measurements of a reward for some seeds, and the resamples that all methods share.

    An interval is over seeds and prompts: seeds are drawn with replacement, and for each of them its prompts. All methods of a
    seed answer the same prompts, with the same random numbers. The first resample is the data themselves.

    Args:
        values: Folder of the measurements.
        reward: Name of the reward.
        seeds: Seeds of data and training.
        chosen_on: Seeds on which each method's learning rate is chosen for each KL; None is ``seeds``.
    """

    def __init__(
        self, values: Path, reward: str, seeds: Sequence[int], chosen_on: Sequence[int] | None = None
    ) -> None:
        self._values, self._reward, self.seeds = values, reward, list(seeds)
        self._choosing = self if chosen_on is None else Measured(values, reward, chosen_on)
        self._starts = {seed: self._read(START, seed)["0/reward"] for seed in self.seeds}
        self.prompts = sum(start.shape[-1] for start in self._starts.values())
        self.start = float(np.mean([start.mean() for start in self._starts.values()]))
        self._trainings = cache(self._trainings_of)

    def _read(self, arm: str, seed: int) -> dict[str, np.ndarray]:
        found = stored(values_file(self._values, self._reward, arm, seed))
        return {
            name: array.astype(np.float64) if array.dtype.kind == "f" else array
            for name, array in found.items()
        }

    def has(self, arm: str) -> bool:
        """Whether an arm was measured with every seed."""
        return bool(self._trainings(arm))

    def has_some(self, arm: str) -> bool:
        """Whether an arm was measured with some of the seeds."""
        return any(values_file(self._values, self._reward, arm, seed).exists() for seed in self.seeds)

    def _trainings_of(self, arm: str) -> dict[float, list[Resampled]]:
        """For each learning rate that was measured with every seed, the trainings of the seeds."""
        read = [self._read(arm, seed) for seed in self.seeds]
        names = set.intersection(*({name for name in one if name.endswith("/reward")} for one in read))
        found = dict[float, list[Resampled]]()
        for rate in sorted(float(name.split("/")[0]) for name in names):
            if len({str(one[f"{rate:g}/made_by"]) for one in read}) > 1:
                raise SystemExit(
                    f"{arm} at {rate:g}: its seeds were trained with different recipes. Run the arm again."
                )
            found[rate] = []
            for number, (seed, one) in enumerate(zip(self.seeds, read, strict=True)):
                start, share = self._starts[seed], self._draws[1][number]
                kl = np.concatenate([np.zeros_like(start), one[f"{rate:g}/kl"]])
                reward = np.concatenate([start, one[f"{rate:g}/reward"]])
                found[rate].append(Resampled(share @ kl.T, share @ reward.T))
        one = ARMS[arm]
        return found | self._ends(found, one.online) if found and (one.online or one.falls) else found

    def _ends(self, found: dict[float, list[Resampled]], online: bool) -> dict[float, list[Resampled]]:
        """A further path: the start, and the ends of the trainings, from the nearest to the furthest.

        Of an online arm that is from the largest KL penalty to the smallest, of another from the smallest learning rate on.
        """
        trainings = [found[rate] for rate in sorted(found, reverse=online)]
        paths = []
        for of_seed in zip(*trainings, strict=True):
            start, ends = of_seed[0], [(one.kl[:, -1:], one.reward[:, -1:]) for one in of_seed]
            kls, rewards = zip((start.kl[:, :1], start.reward[:, :1]), *ends, strict=True)
            paths.append(Resampled(np.concatenate(kls, 1), np.concatenate(rewards, 1)))
        return {0.0: paths}

    @cached_property
    def _draws(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """For each resample its seeds, ``[b, seeds]``, and for each seed the share of each prompt, ``[b, prompts]``."""
        rng, count = np.random.default_rng(0), len(self.seeds)
        seeds = rng.integers(count, size=(RESAMPLES, count))
        seeds[0] = np.arange(count)
        shares = []
        for start in self._starts.values():
            prompts = start.shape[-1]
            drawn = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES)
            drawn[0] = 1
            shares.append(drawn / prompts)
        return seeds, shares

    def _over_seeds(self, of_seeds: Sequence[np.ndarray]) -> np.ndarray:
        """Means over the seeds of each resample, from one array of resamples for each seed.  -> [b]"""
        return np.take_along_axis(np.stack(of_seeds, 1), self._draws[0], 1).mean(1)

    def rewards(self, arm: str, target: float) -> np.ndarray | None:
        """An arm's reward at a KL, for each resample; None if no learning rate brought every seed there.  -> [b]"""
        rate = self._choosing.rate_of(arm, target)
        trainings = self._trainings(arm).get(rate) if rate is not None else None
        if trainings is None:
            return None
        found = self._over_seeds([at(*one, target) for one in trainings])
        return None if np.isnan(found[0]) else found

    def minus(self, arm: str, base: str, target: float) -> np.ndarray | None:
        """An arm's reward minus another's at a KL, for each resample; None if one of them did not get there.  -> [b]"""
        own, other = self.rewards(arm, target), self.rewards(base, target)
        return None if own is None or other is None else own - other

    def penalties(self, arm: str) -> list[float]:
        """The KL factors of an online arm that were measured with every seed, from the largest on."""
        return sorted((rate for rate in self._trainings(arm) if rate), reverse=True)

    def end(self, arm: str, rate: float) -> Resampled:
        """Where the trainings of an arm with one learning rate, or one KL factor, ended.  -> [b], [b]"""
        trainings = self._trainings(arm)[rate]
        kls, rewards = ([path[:, -1] for path in paths] for paths in zip(*trainings, strict=True))
        return Resampled(self._over_seeds(kls), self._over_seeds(rewards))

    def minus_at_its_end(self, arm: str, rate: float, base: str) -> "Gain | None":
        """An arm's reward where its trainings ended, minus another's at the same KL of each seed; None if that did not get there.

        The other's learning rate is the best one at these distances, on the seeds that choose; as in :meth:`rates_of`, one that was
        measured around them goes first.
        """
        known = {
            other: gain
            for other in self._choosing._trainings(base)
            if (gain := self._choosing._minus_at_end(arm, rate, base, other)) is not None
        }
        for other in sorted(known, key=lambda one: (not known[one].measured, known[one].gain[0])):
            if (gain := self._minus_at_end(arm, rate, base, other)) is not None:
                return gain
        return None

    def _minus_at_end(self, arm: str, rate: float, base: str, other: float) -> "Gain | None":
        """The same against one learning rate of the other; None if a seed did not get there."""
        pairs = list(zip(self._trainings(arm)[rate], self._trainings(base)[other], strict=True))
        gain = self._over_seeds([own.reward[:, -1] - at(*path, own.kl[:, -1]) for own, path in pairs])
        measured = all(_between_points([path], own.kl[0, -1]) for own, path in pairs)
        return None if np.isnan(gain[0]) else Gain(gain, measured)

    def rates_of(self, arm: str, target: float) -> list[float]:
        """The learning rates with which every seed reached a KL, from the highest mean reward there down.

        A rate that was measured before and after that KL goes before one whose first measured point lies beyond it: between the
        start and its first point, a training's path is not known. Of such rates the one with the nearest first point goes first.
        """
        order = dict[float, tuple[bool, float]]()
        for rate, trainings in self._trainings(arm).items():
            found = [at(one.kl[:1], one.reward[:1], target)[0] for one in trainings]
            if not np.isnan(found).any():
                measured = _between_points(trainings, target)
                nearest = -float(np.mean([one.kl[0, 1] for one in trainings]))
                order[rate] = (measured, float(np.mean(found)) if measured else nearest)
        return sorted(order, key=lambda rate: order[rate], reverse=True)

    def rate_of(self, arm: str, target: float) -> float | None:
        """The first of :meth:`rates_of`; None if there is none."""
        return next(iter(self.rates_of(arm, target)), None)

    def is_measured(self, arm: str, target: float) -> bool:
        """Whether an arm's reward at a KL is read between measured points, and not between the start and the first of them."""
        rate = self._choosing.rate_of(arm, target)
        return rate is not None and _between_points(self._trainings(arm).get(rate, []), target)

    def best(self, arms: Sequence[str], target: float) -> str | None:
        """The arm with the highest mean reward at a KL, on the seeds that choose; None if none got there with every seed."""
        means = {arm: found[0] for arm in arms if (found := self._choosing.rewards(arm, target)) is not None}
        return max(means, key=lambda arm: means[arm]) if means else None

    @cached_property
    def _best_of(self) -> list[dict[str, list[float]]]:
        """For each seed the reward of best-of-N sampling over prompts, for each N."""
        files = [self._values / f"best_of-{seed}.json" for seed in self.seeds]
        return [json.loads(file.read_text(encoding="utf-8"))[self._reward] for file in files]

    @property
    def largest(self) -> int:
        """The largest N of best-of-N sampling."""
        return max(map(int, self._best_of[0]))

    def limit(self, target: float) -> np.ndarray:
        """The reward of best-of-N sampling at a KL, between the measured N; beyond them that of the largest, which is too low.  -> [b]"""
        found = []
        for number, values in enumerate(self._best_of):
            kl = np.array([best_of_kl(int(n)) for n in values])
            measured = np.array(list(values.values()))
            share = self._draws[1][number][:, : measured.shape[1]]
            rewards = share / share.sum(1, keepdims=True) @ measured.T
            found.append(at(np.tile(kl, (RESAMPLES, 1)), rewards, min(target, float(kl[-1]))))
        return self._over_seeds(found)


def _between_points(trainings: Sequence[Resampled], target: float) -> bool:
    """Whether every training has a measured point after the start, at a KL or before it."""
    return all(one.kl[0, 1] <= target for one in trainings)


def at(kl: np.ndarray, reward: np.ndarray, target: float | np.ndarray) -> np.ndarray:
    """Rewards where paths first reach a KL, or each its own, between the points before and after; NaN where they do not.

    [b, p], [b, p], [] or [b] -> [b]

    Between two points the reward is linear in the root of the KL, as a small step's gain is; a line over the KL itself would lie
    under every curve, and most where points are far apart.
    """
    reached = kl >= np.reshape(target, (-1, 1))
    after = np.maximum(reached.argmax(1), 1)
    rows = np.arange(len(kl))
    low, high = np.sqrt(np.maximum(kl[rows, after - 1], 0.0)), np.sqrt(np.maximum(kl[rows, after], 0.0))
    share = (np.sqrt(target) - low) / np.where(high > low, high - low, 1.0)
    found = reward[rows, after - 1] + share * (reward[rows, after] - reward[rows, after - 1])
    return np.where(reached.any(1), found, np.nan)


def figure(resamples: np.ndarray, count: int) -> Figure:
    """The value with its 95 % interval. Resamples that did not reach the KL are left out of the interval."""
    low, high = np.nanpercentile(resamples, [2.5, 97.5])
    return Figure(float(resamples[0]), float(low), float(high), count)
