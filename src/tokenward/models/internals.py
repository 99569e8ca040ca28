"""Layers of any transformers model, what they return in a call, and how far two calls differ."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenward.errors import UserError

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
"""Names under which a layer keeps its attention."""

MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
"""Names under which it keeps the rest."""


def layers_of(model: nn.Module, name: str) -> list[nn.Module]:
    """The layers of a model, first to last.

    Args:
        model: The model.
        name: As the user wrote it, for messages.

    Raises:
        UserError: it keeps no list of as many layers as its config says.
    """
    count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr]
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise UserError(
        f"{name} has no list of {count} layers, as its config says, so its inside cannot be looked at. Use another scorer."
    )


def part_of(layer: nn.Module, names: tuple[str, ...], model: str) -> nn.Module:
    """A layer's attention or MLP.

    Raises:
        UserError: it has none under a known name.
    """
    children = dict(layer.named_children())
    for name in names:
        if name in children:
            return children[name]
    raise UserError(
        f"a layer of {model} has no part named {', '.join(names)} (it has {', '.join(children)}). Use another scorer."
    )


@contextmanager
def outputs_of(modules: dict[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """While open, what each module puts out is kept, under its name; a later call replaces an earlier one."""
    found: dict[str, Any] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[name] = output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(output: Any) -> Tensor:
    """A module's main output, where it gives several."""
    return output if isinstance(output, Tensor) else output[0]


OUTPUT = "its output"
"""Name of what the whole model puts out."""


class Apart(NamedTuple):
    """Where two readings differ most.

    Attributes:
        part: The part of the model.
        by: Largest difference there, as a share of the largest number there; NaN where one is not finite.
    """

    part: str
    by: float


Readings = dict[str, Tensor]
"""What each part put out, by its name, ``[rows x t, d]``, in the order in which they were done."""


def readings(model: nn.Module, call: Callable[[], Any], shape: tuple[int, int]) -> Readings:
    """What the layers of a model, their parts and the model itself put out in one call.

    The parts of a layer are what mixes tokens: a difference there is not yet small against the residual stream.

    Args:
        model: The model.
        call: Calls it.
        shape: Rows and tokens of the call; what has another shape is no value per token, and is left out.
    """
    found: Readings = {}
    times = Counter[str]()

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            rows = _rows(output, shape)
            times[name] += 1
            if rows is not None:
                found[name if times[name] == 1 else f"{name} (call {times[name]})"] = rows.detach()

        return hook

    with ExitStack() as stack:
        for name, module in _parts(model):
            stack.callback(module.register_forward_hook(keep(name)).remove)
        output = call()
    rows = _rows(output, shape)
    return found if rows is None else {**found, OUTPUT: rows}


def apart(first: Readings, second: Readings) -> Apart:
    """Where two readings of the same rows lie furthest apart."""
    every = [Apart(name, _difference(first[name], second[name])) for name in first if name in second]
    return max(every, key=lambda item: (item.by != item.by, item.by), default=Apart("nothing", float("nan")))


def moved(first: Readings, second: Readings) -> str | None:
    """The first part whose outputs are not the same to the bit."""
    return next((name for name in first if not torch.equal(first[name], second[name])), None)


def _difference(first: Tensor, second: Tensor) -> float:
    first, second = first.float(), second.float()
    largest = float(second.abs().max())
    difference = float((first - second).abs().max())
    return difference if largest == 0 else difference / largest


def _rows(output: Any, shape: tuple[int, int]) -> Tensor | None:
    """A part's main output, one row a token.  -> [rows x t, d]"""
    try:
        main = first_tensor(output)
    except (KeyError, IndexError):
        return None
    if not isinstance(main, Tensor) or not main.is_floating_point():
        return None
    if main.dim() >= 3 and main.shape[:2] == shape:
        return main.flatten(0, 1).flatten(1)
    return main if main.dim() == 2 and len(main) == shape[0] * shape[1] else None


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Elements of the outermost lists of modules."""
    lists: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{other}.") for other in lists):
            lists.append(name)
            yield from ((f"{name}.{place}", layer) for place, layer in enumerate(module))


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in _layers(model):
        yield name, layer
        yield from ((f"{name}.{child}", part) for child, part in layer.named_children())


HALF = (torch.bfloat16, torch.float16)


def is_half(model: nn.Module) -> bool:
    """Whether any weight of a model is of half precision."""
    return any(parameter.dtype in HALF for parameter in model.parameters())


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """While open, a model of half precision computes in float32; a layer is widened for as long as it is called.

    Its weights are the same objects afterwards, so that a model that just fits need not fit twice.
    """
    with ExitStack() as stack:
        within = set[int]()
        for _, layer in _layers(model):
            within |= {id(tensor) for tensor in (*layer.parameters(), *layer.buffers())}
            stack.enter_context(_widened_in_calls(layer))
        stack.enter_context(_widened(model, without=within))
        yield


@contextmanager
def _widened_in_calls(layer: nn.Module) -> Iterator[None]:
    open_calls: list[ExitStack] = []

    def begin(module: nn.Module, inputs: Any) -> None:
        open_calls.append(ExitStack())
        open_calls[-1].enter_context(_widened(module))

    def end(module: nn.Module, inputs: Any, output: Any) -> None:
        open_calls.pop().close()

    handles = layer.register_forward_pre_hook(begin), layer.register_forward_hook(end, always_call=True)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for stack in open_calls:
            stack.close()


@contextmanager
def _widened(module: nn.Module, without: set[int] = frozenset()) -> Iterator[None]:  # type: ignore[assignment]
    narrow = [
        tensor
        for tensor in {id(item): item for item in (*module.parameters(), *module.buffers())}.values()
        if tensor.dtype in HALF and id(tensor) not in without
    ]
    before = [tensor.data for tensor in narrow]
    for tensor in narrow:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, data in zip(narrow, before, strict=True):
            tensor.data = data
