"""Run the sides in turns: warm up, then repeatedly one step each."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from benchmarks.model import Layout, Pair, Rates
from benchmarks.workers import Worker


class Side(NamedTuple):
    """Function and settings of a worker."""

    function: str
    settings: Mapping[str, Any]


class Turns(NamedTuple):
    """Measurements of each side, by name.

    Attributes:
        seconds: Time of each measured step.
        memory: Memory of the process after the last step; ``VmHWM`` is its peak.
        losses: Loss of the first batch before the first step and after the last.
        facts: Facts that the side reported when it was ready.
        rates: Rates of the machine, measured between the warm-up and the first measured step.
    """

    seconds: dict[str, list[float]]
    memory: dict[str, dict[str, int]]
    losses: dict[str, tuple[float, float]]
    facts: dict[str, dict[str, Any]]
    rates: Rates

    def layouts(self, name: str, batch: int) -> list[Layout]:
        """Layout of each batch on one of tokenward's sides, including padding."""
        kept = [kept for _, _, kept in self.facts[name]["lengths"]]
        return [
            Layout(
                tuple(width for rows, width in passes for _ in range(rows)),
                sum(kept[batch * number : batch * (number + 1)]),
            )
            for number, passes in enumerate(self.facts[name]["layouts"])
        ]

    def pairs(self, name: str) -> list[Pair]:
        """Lengths of the comparisons on one of tokenward's sides."""
        return [Pair(prompt, tuple(responses)) for prompt, responses, _ in self.facts[name]["lengths"]]


def take_turns(
    sides: Mapping[str, Side],
    *,
    repetitions: int,
    warm_up: int,
) -> Turns:
    """Run the sides in turns.

    Args:
        sides: By name. Repetitions alternate between this order and its reverse.
        repetitions: Measured steps of each side.
        warm_up: Steps of each side before the measurement.
    """
    with ExitStack() as stack:
        # Workers start one after another, so that they do not compete for the disk.
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
                seconds[name].append(workers[name].ask("step")["seconds"])
        memory = {name: worker.ask("memory") for name, worker in workers.items()}
        after = {name: worker.ask("check")["loss"] for name, worker in workers.items()}
        losses = {name: (before[name], after[name]) for name in sides}
        return Turns(seconds, memory, losses, {name: item.facts for name, item in workers.items()}, rates)


def order(names: Sequence[str], number: int) -> list[str]:
    """The names in order, reversed in every second repetition."""
    return list(names) if number % 2 == 0 else list(reversed(names))


def machine_rates(settings: Mapping[str, Any]) -> Rates:
    """Measure the machine's rates while all other workers wait."""
    with Worker("benchmarks.rates:side", settings) as worker:
        return Rates(**worker.ask("rates"))


def same_mathematics(
    losses: Mapping[str, tuple[float, float]], names: Sequence[str], *, within: float
) -> float:
    """Largest difference between the losses of the sides before the first step.

    Raises:
        ValueError: The sides do not compute the same loss, so comparing their times would mean nothing.
    """
    values = [losses[name][0] for name in names]
    # Compare all pairs: max() and min() are undefined if there is a NaN.
    differences = [abs(first - second) for first in values for second in values]
    if not all(value <= within for value in differences):
        raise ValueError(
            f"{', '.join(names)} disagree on the loss of the first batch: {values}. A difference of {within} is allowed"
        )
    return max(differences)
