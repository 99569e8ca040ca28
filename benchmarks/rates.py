"""Measured rates of this machine: the two constants of the cost model."""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch

from benchmarks.model import Rates
from benchmarks.workers import Channel, serve

ROWS, INPUTS, OUTPUTS = 1024, 576, 1536
"""Sizes of a product in the default model."""

ON_A_GPU = 8192
"""Size of a product that fills a GPU, in each direction."""

MOVED = 2**26
"""Number of floats in the copied tensor: far more than any cache holds."""


def best_rate(work: Callable[[], Any], amount: float, *, times: int = 5) -> float:
    """Amount of work per second, at the median time of several runs."""
    work()
    seconds = []
    for _ in range(times):
        start = perf_counter()
        work()
        seconds.append(perf_counter() - start)
    return amount / median(seconds)


def measured(dtype: torch.dtype, device: str = "cpu") -> Rates:
    """Operations per second in matrix products, and bytes per second in an element-wise operation."""
    on_gpu = device.startswith("cuda")
    rows, inputs, outputs = (ON_A_GPU,) * 3 if on_gpu else (ROWS, INPUTS, OUTPUTS)
    left = torch.randn(rows, inputs).to(device, dtype)
    right = torch.randn(inputs, outputs).to(device, dtype)
    source, target = torch.ones(MOVED, device=device), torch.empty(MOVED, device=device)

    def finished(work: Callable[[], Any]) -> None:
        work()
        if on_gpu:
            torch.cuda.synchronize()

    operations = best_rate(
        lambda: finished(lambda: [left @ right for _ in range(20)]), 20 * 2.0 * rows * inputs * outputs
    )
    moved = best_rate(lambda: finished(lambda: torch.mul(source, 2.0, out=target)), 2 * 4.0 * MOVED)
    return Rates(operations, moved)


def side(channel: Channel, settings: dict[str, Any]) -> None:
    """A worker that measures the rates on request."""
    dtype = torch.bfloat16 if settings["precision"] == "bfloat16" else torch.float32
    serve(channel, {"rates": lambda _: measured(dtype, settings["device"])._asdict()}, {})
