"""The worker of the machine-share claim: a SePO step, the time of its bare matrix products, and a profile."""

from collections.abc import Callable, Iterable
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gate import Gate
from benchmarks.model import Product, Shape
from benchmarks.ours import lengths_in, make_trainer, shown_settings
from benchmarks.workers import Channel

FAMILIES: dict[str, tuple[str, ...]] = {
    "attention": ("scaled_dot_product", "flash_attention", "_softmax", "flex_attention"),
    "matrix products": ("mm", "linear", "matmul", "einsum", "mkldnn_linear"),
    "optimizer": ("optimizer", "_fused_adam", "adamw", "_foreach", "clip_grad"),
    "element-wise": (
        "mul", "add", "sub", "div", "silu", "pow", "rsqrt", "neg", "exp", "log", "sum", "mean", "cat", "max",
        "copy_", "where", "sigmoid", "fill_", "zero_", "sqrt", "cos", "sin", "masked", "index", "gather", "scatter",
    ),
}  # fmt: skip
"""Families of operations by words in their names. The first match counts."""


class Timing(NamedTuple):
    """Number of operations and seconds of some matrix products."""

    operations: float
    seconds: float


def family_of(name: str) -> str:
    """The family of an operation by its name, such as ``aten::mm`` or ``AddmmBackward0``.

    >>> family_of("aten::addmm"), family_of("aten::_fused_adamw_"), family_of("aten::silu_backward")
    ('matrix products', 'optimizer', 'element-wise')
    """
    plain = name.lower().removeprefix("aten::")
    return next((kind for kind, words in FAMILIES.items() if any(word in plain for word in words)), "other")


def shares(times: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Share of the total time by family."""
    totals = dict.fromkeys([*FAMILIES, "other"], 0.0)
    for name, seconds in times:
        totals[family_of(name)] += seconds
    whole = sum(totals.values())
    return {kind: value / whole for kind, value in totals.items()}


def time_product(item: Product, rows: int, dtype: torch.dtype, *, times: int = 3) -> Timing:
    """Time a product in the forward pass and for both gradients of the backward pass."""
    inputs, weight = (
        torch.randn(rows, item.inputs).to(dtype),
        torch.randn(item.outputs, item.inputs).to(dtype),
    )
    gradient = torch.randn(rows, item.outputs).to(dtype)
    works: list[Callable[[], Any]] = [
        lambda: torch.nn.functional.linear(inputs, weight),
        lambda: gradient @ weight,
        lambda: gradient.t() @ inputs,
    ]
    total = 0.0
    for work in works:
        work()
        seconds = []
        for _ in range(times):
            started = perf_counter()
            work()
            seconds.append(perf_counter() - started)
        total += median(seconds)
    return Timing(3 * 2.0 * rows * item.inputs * item.outputs, total)


def machine_time(shape: Shape, tokens: int, head_rows: int, dtype: torch.dtype) -> Timing:
    """Time of all matrix products with weights in a step, each run separately."""
    layer = [time_product(item, tokens, dtype) for item in shape.layer_products()]
    head = time_product(shape.head_product, head_rows, dtype)
    return Timing(
        shape.layers * sum(item.operations for item in layer) + head.operations,
        shape.layers * sum(item.seconds for item in layer) + head.seconds,
    )


def side(channel: Channel, settings: dict[str, Any]) -> None:
    """A worker with tokenward's trainer that also times bare products and profiles steps."""
    trainer = make_trainer(settings)
    shape = Shape.of(trainer.token_model.model.config)
    dtype = torch.bfloat16 if settings["precision"] == "bfloat16" else torch.float32
    running: list[Any] = []

    def products(request: dict[str, Any]) -> dict[str, Any]:
        return machine_time(shape, request["tokens"], request["head_rows"], dtype)._asdict()

    def begin(request: dict[str, Any]) -> dict[str, Any]:
        running.append(profile(activities=[ProfilerActivity.CPU]))
        running[-1].start()
        return {}

    def end(request: dict[str, Any]) -> dict[str, Any]:
        running[-1].stop()
        events = running[-1].key_averages()
        longest = sorted(events, key=lambda item: -item.self_cpu_time_total)[:25]
        return {
            "shares": shares((item.key, item.self_cpu_time_total) for item in events),
            "longest": [[item.key, item.self_cpu_time_total / 1e6, item.count] for item in longest],
        }

    actions = {"products": products, "profile_begin": begin, "profile_end": end}
    facts = {"settings": shown_settings(trainer), "lengths": lengths_in(trainer)}
    trainer.add_callback(Gate(channel, actions, facts))
    trainer.train()
