"""Share of a SePO step's time that is necessary matrix products: claim ``machine_share``.

Necessary are the products with weights, forward and for both gradients, over real tokens, without padding, attention or
recomputed logits. They are timed separately, between the steps and with the same number of rows. The share is this time
divided by the time of the step.
"""

import argparse

from transformers import AutoConfig

from benchmarks.folders import folder_of
from benchmarks.model import Pair, Shape, shared, training_step
from benchmarks.options import parser, prepared, public, settings_of
from benchmarks.results import Result, report
from benchmarks.statistics import bootstrap, median
from benchmarks.turns import machine_rates
from benchmarks.workers import Worker

WARM_UP = 2
NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def main() -> None:
    """Measure and report."""
    options = parser(__doc__, repetitions=6)
    options.add_argument(
        "--precision", choices=NAMES, default="fp32", help="float32, or autocast to bfloat16"
    )
    with prepared(options.parse_args()) as found:
        report([measure(found)])


def measure(options: argparse.Namespace) -> Result:
    """Time steps and bare products in turns, then profile one step."""
    settings = settings_of(options, precision=NAMES[options.precision])
    batch, fraction = settings["batch"], settings["fraction"]
    rates = machine_rates(settings)
    steps, bare = [], []
    with Worker("benchmarks.machine:side", settings) as worker:
        lengths = worker.facts["lengths"]
        for _ in range(WARM_UP):
            worker.ask("step")
        for number in range(WARM_UP, WARM_UP + options.repetitions):
            steps.append(worker.ask("step")["seconds"])
            part = [lengths[(number * batch + place) % len(lengths)] for place in range(batch)]
            tokens = sum(prompt + sum(responses) for prompt, responses, _ in part)
            bare.append(worker.ask("products", tokens=tokens, head_rows=sum(kept for _, _, kept in part)))
        worker.ask("profile_begin")
        worker.ask("step")
        profile = worker.ask("profile_end")
    shares = [item["seconds"] / step for item, step in zip(bare, steps, strict=True)]
    low, high = bootstrap(shares)
    shape = Shape.of(AutoConfig.from_pretrained(folder_of(options.model)))
    parts = [Pair(prompt, tuple(responses)) for prompt, responses, _ in lengths]
    cost = training_step(shape, shared(parts[:batch], fraction=fraction))
    needed = training_step(shape, shared(parts[:batch], fraction=fraction, padded=False), head_passes=3)
    return Result(
        claim="machine_share" if options.precision == "fp32" else f"machine_share_{options.precision}",
        target=">= 0.7" if options.precision == "fp32" else "reported",
        ratio=median(shares),
        low=low,
        high=high,
        ours={"seconds": steps, "profile": profile},
        peer={"bare_products": bare},
        repetitions=len(steps),
        predicted=needed.products / rates.operations / cost.seconds(rates),
        settings={"common": public(settings), "sides": worker.facts["settings"], "rates": rates._asdict()},
        quick=options.quick,
    )


if __name__ == "__main__":
    main()
