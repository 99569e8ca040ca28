"""Matrix products in float32 against bfloat16 on this processor, both sides in turns: claim ``bfloat16_products``."""

import argparse
from functools import partial

import torch

from benchmarks.options import parser
from benchmarks.rates import INPUTS, OUTPUTS, ROWS, best_rate
from benchmarks.results import Result, report
from benchmarks.statistics import paired_ratio
from tokenward.models.precision import imitates_bfloat16


def main() -> None:
    """Measure and report."""
    report([measure(parser(__doc__, repetitions=9).parse_args())])


def measure(options: argparse.Namespace) -> Result:
    """Operations a second of both, in turns; how many times more float32 does."""
    torch.set_num_threads(options.threads)
    rates: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(options.repetitions):
        for dtype, found in rates.items():
            left, right = torch.randn(ROWS, INPUTS).to(dtype), torch.randn(INPUTS, OUTPUTS).to(dtype)
            # Two products in all: an imitated one takes seconds.
            found.append(
                best_rate(partial(torch.matmul, left, right), 2.0 * ROWS * INPUTS * OUTPUTS, times=1)
            )
    float32, bfloat16 = rates.values()
    ratio = paired_ratio([1 / rate for rate in bfloat16], [1 / rate for rate in float32])
    return Result(
        claim="bfloat16_products",
        target="reported",
        ratio=ratio.value,
        low=ratio.low,
        high=ratio.high,
        ours={"float32_operations_per_second": float32, "bfloat16_operations_per_second": bfloat16},
        peer={"imitated": imitates_bfloat16(torch.device("cpu"))},
        repetitions=options.repetitions,
        predicted=None,
        settings={"rows": ROWS, "inputs": INPUTS, "outputs": OUTPUTS, "threads": options.threads},
        quick=options.quick,
    )


if __name__ == "__main__":
    main()
