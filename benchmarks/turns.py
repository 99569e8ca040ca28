"""Sides in turns: warm up, then one step each, again and again."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from benchmarks.model import Layout, Pair, Rates
from benchmarks.workers import Worker


class Side(NamedTuple):
    """A worker's function and what it is given."""

    function: str
    settings: Mapping[str, Any]


class Turns(NamedTuple):
    """What each side said, by its name.

    Attributes:
        seconds: Of each timed step.
        memory: The process's memory after the last step, ``VmHWM`` its peak.
        losses: Of the first batch before the first step and after the last.
        facts: What the side said when it was ready.
        rates: Of the machine, measured between the warm-up and the first timed step.
    """

    seconds: dict[str, list[float]]
    memory: dict[str, dict[str, int]]
    losses: dict[str, tuple[float, float]]
    facts: dict[str, dict[str, Any]]
    rates: Rates

    def layouts(self, name: str, batch: int) -> list[Layout]:
        """What of each batch a side of tokenward's gave to the model, padding included."""
        kept = [kept for _, _, kept in self.facts[name]["lengths"]]
        return [
            Layout(
                tuple(width for rows, width in passes for _ in range(rows)),
                sum(kept[batch * number : batch * (number + 1)]),
            )
            for number, passes in enumerate(self.facts[name]["layouts"])
        ]

    def pairs(self, name: str) -> list[Pair]:
        """Lengths of the comparisons that a side of tokenward's trains on."""
        return [Pair(prompt, tuple(responses)) for prompt, responses, _ in self.facts[name]["lengths"]]


def take_turns(
    sides: Mapping[str, Side],
    *,
    repetitions: int,
    warm_up: int,
    every: Mapping[str, int] | None = None,
) -> Turns:
    """Drive the sides alternately.

    Args:
        sides: By name; each repetition asks them in this order, and in the reverse one every second time, so that
            none always comes after the same other.
        repetitions: Timed steps of each side.
        warm_up: Steps of each side before, which nobody counts.
        every: Sides that only take part in every so manieth repetition.
    """
    every = every or {}
    with ExitStack() as stack:
        # One is ready before the next begins: reading models at once would time nothing but the disk.
        workers = {
            name: stack.enter_context(Worker(side.function, side.settings)) for name, side in sides.items()
        }
        before = {name: worker.ask("check")["loss"] for name, worker in workers.items()}
        for worker in workers.values():
            for _ in range(warm_up):
                worker.ask("step")
        rates = machine_rates(next(iter(sides.values())).settings)
        seconds = {name: [] for name in sides}
        for number in range(repetitions):
            for name in order(list(sides), number):
                if number % every.get(name, 1) == 0:
                    seconds[name].append(workers[name].ask("step")["seconds"])
        memory = {name: worker.ask("memory") for name, worker in workers.items()}
        after = {name: worker.ask("check")["loss"] for name, worker in workers.items()}
        losses = {name: (before[name], after[name]) for name in sides}
        return Turns(seconds, memory, losses, {name: item.facts for name, item in workers.items()}, rates)


def order(names: Sequence[str], number: int) -> list[str]:
    """Names in their order, turned round in every second repetition."""
    return list(names) if number % 2 == 0 else list(reversed(names))


def machine_rates(settings: Mapping[str, Any]) -> Rates:
    """The machine's rates, measured while everybody else sleeps."""
    with Worker("benchmarks.rates:side", settings) as worker:
        return Rates(**worker.ask("rates"))


def same_mathematics(
    losses: Mapping[str, tuple[float, float]], names: Sequence[str], *, within: float
) -> float:
    """Largest difference of the sides' losses before the first step; refuses to go on where it is too large.

    Raises:
        ValueError: two sides do not compute the same thing, so their times say nothing.
    """
    values = [losses[name][0] for name in names]
    # Not by the largest and the smallest: which of several numbers is the largest is undefined beside a NaN.
    differences = [abs(first - second) for first in values for second in values]
    if not all(value <= within for value in differences):
        raise ValueError(
            f"{', '.join(names)} disagree on the first batch's loss: {values}; allowed is {within}"
        )
    return max(differences)
