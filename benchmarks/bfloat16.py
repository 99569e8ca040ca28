"""Time of a linear layer in bfloat16 against float32 on this CPU: claims ``bfloat16_forward``, ``bfloat16_backward``.

Scoring and sampling run the forward pass; training adds the backward pass. The time of an emulated product depends on the
memory layout of its factors, so the layer is measured as models use it, not a single product of the same size.
"""

import argparse
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import nn

from benchmarks.options import parser
from benchmarks.rates import INPUTS, OUTPUTS, ROWS
from benchmarks.results import Result, report
from benchmarks.statistics import paired_ratio
from tokenward.models.loading import imitates_bfloat16

PASSES = ("forward", "backward")


def main() -> None:
    """Measure and report."""
    report(measure(parser(__doc__, repetitions=9).parse_args()))


def measure(options: argparse.Namespace) -> list[Result]:
    """Time both passes in both types, in turns."""
    torch.set_num_threads(options.threads)
    found: dict[torch.dtype, list[dict[str, float]]] = {torch.float32: [], torch.bfloat16: []}
    for dtype in found:
        passes(dtype)  # the first product of each type sets up its kernel
    for _ in range(options.repetitions):
        for dtype, seconds in found.items():
            seconds.append(passes(dtype))
    return [result(options, name, *found.values()) for name in PASSES]


def passes(dtype: torch.dtype) -> dict[str, float]:
    """Seconds of a linear layer's forward pass, and of its backward pass to its input and weights."""
    layer = nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=dtype)
    rows = torch.randn(ROWS, INPUTS, dtype=dtype, requires_grad=True)
    out, forward = timed(lambda: layer(rows))
    _, backward = timed(lambda: out.backward(torch.ones_like(out)))
    return {"forward": forward, "backward": backward}


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result of ``work()``, and its time in seconds."""
    start = perf_counter()
    done = work()
    return done, perf_counter() - start


def result(
    options: argparse.Namespace, name: str, float32: list[dict[str, float]], bfloat16: list[dict[str, float]]
) -> Result:
    """Result of one of the passes."""
    slow, fast = ([seconds[name] for seconds in each] for each in (bfloat16, float32))
    ratio = paired_ratio(slow, fast)
    return Result(
        claim=f"bfloat16_{name}",
        target="reported",
        ratio=ratio.value,
        low=ratio.low,
        high=ratio.high,
        ours={"float32_seconds": fast, "bfloat16_seconds": slow},
        peer={"imitated": imitates_bfloat16(torch.device("cpu"))},
        repetitions=options.repetitions,
        predicted=None,
        settings={"rows": ROWS, "inputs": INPUTS, "outputs": OUTPUTS, "threads": options.threads},
        quick=options.quick,
    )


if __name__ == "__main__":
    main()
