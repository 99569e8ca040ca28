"""Time per token of a step against the length of the sequence: claim ``sequence_length``, and its picture.

The model has the default model's width and three of its layers, so that the longest rows fit a small machine. The head
therefore has a larger share than in the whole model.
"""

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from transformers import AutoConfig

from benchmarks.folders import cut_down
from benchmarks.model import Pair, Shape, separate, shared, training_step
from benchmarks.options import parser, prepared, public, settings_of
from benchmarks.results import FOLDER, Result, report
from benchmarks.statistics import bootstrap
from benchmarks.turns import machine_rates, order
from benchmarks.workers import Worker

LENGTHS = [128, 256, 512, 1024, 2048, 4096]
LAYERS = 3
PICTURE = FOLDER.parent.parent / "docs" / "pictures" / "sequence_length.svg"


def main() -> None:
    """Measure, draw and report."""
    with prepared(parser(__doc__, repetitions=5).parse_args()) as options:
        report([measure(options)])


def measure(options: argparse.Namespace) -> Result:
    """One pair per step, prompt and responses of half the length each; all lengths in turn on both sides."""
    lengths = LENGTHS[:3] if options.quick else LENGTHS
    pairs = [Pair(length // 2, (length // 2, length // 2)) for length in lengths]
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        model = options.model
        if not options.quick:
            model = str(cut_down(options.model, Path(folder) / "cut", layers=LAYERS))
        config = AutoConfig.from_pretrained(model)
        settings: dict[str, Any] = settings_of(
            options, lengths=[list(pair) for pair in pairs], ids=config.vocab_size, batch=1
        ) | {"model": model}
        seconds = timed(options, settings, len(lengths))
        rates = machine_rates(settings)
    # For both sides, count the tokens of two plain rows, whatever their layout.
    per_token = {
        name: [
            [value / (2 * length) for value in values] for values, length in zip(found, lengths, strict=True)
        ]
        for name, found in seconds.items()
    }
    middle = {name: [median(values) for values in found] for name, found in per_token.items()}
    if not options.quick:
        draw(lengths, middle)
    ratios = [b / a for a, b in zip(per_token["ours"][-1], per_token["trl"][-1], strict=True)]
    low, high = bootstrap(ratios)
    shape = Shape.of(config)
    ours = training_step(shape, shared(pairs[-1:], fraction=settings["fraction"])).seconds(rates)
    return Result(
        claim="sequence_length",
        target="reported",
        ratio=median(ratios),
        low=low,
        high=high,
        ours={"lengths": lengths, "seconds_per_token": middle["ours"]},
        peer={"lengths": lengths, "seconds_per_token": middle["trl"]},
        repetitions=options.repetitions,
        predicted=training_step(shape, separate(pairs[-1:])).seconds(rates) / ours,
        settings={"common": public(settings), "layers": shape.layers, "ratio_is_at": lengths[-1]},
        quick=options.quick,
    )


def timed(options: argparse.Namespace, settings: dict, count: int) -> dict[str, list[list[float]]]:
    """Seconds of the steps of each side, by length."""
    sides = {"ours": "benchmarks.ours:training", "trl": "benchmarks.peers:dpo"}
    found: dict[str, list[list[float]]] = {name: [[] for _ in range(count)] for name in sides}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(side, settings)) for name, side in sides.items()}
        for number in range(options.repetitions + 1):
            for place in range(count):  # the sampler is sequential: one step per length, repeatedly
                for name in order(list(sides), number):
                    value = workers[name].ask("step")["seconds"]
                    if number > 0:  # the first round warms up
                        found[name][place].append(value)
    return found


def draw(lengths: list[int], seconds: dict[str, list[float]]) -> None:
    """Write the picture."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "tokenward"  # the same numbers give the same bytes
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6))
    names = {"ours": "tokenward, SePO at 30 %", "trl": "TRL, DPO with stored reference"}
    for name, values in seconds.items():
        axes.plot(lengths, [1000 * value for value in values], marker="o", label=names[name])
    axes.set(xscale="log", xlabel="tokens of prompt and response", ylabel="milliseconds per token")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()  # their labels would overlap the lengths
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
