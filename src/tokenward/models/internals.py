"""Access to the layers of any transformers model: their parts, their outputs, and computing in float32."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokenward.errors import UserError

# transformers has no common interface for the parts of a layer; these are the names that its families use.
ATTENTION = ("self_attn", "attn", "attention", "self_attention")
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")


def layers_of(model: nn.Module, name: str) -> list[nn.Module]:
    """Layers of a model, first to last.

    Args:
        model: The model.
        name: Name of the model for messages.

    Raises:
        UserError: The model has no list of as many layers as its config says.
    """
    count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr]
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise UserError(
        f"{name} has no list of {count} layers, the number in its config, so its layers cannot be read. Use another scorer.",
        code="unsupported-model",
    )


def part_of(layer: nn.Module, names: tuple[str, ...], model: str) -> nn.Module:
    """Attention or MLP of a layer; raises a :class:`UserError` if no child has one of the names."""
    children = dict(layer.named_children())
    for name in names:
        if name in children:
            return children[name]
    raise UserError(
        f"a layer of {model} has no part named {', '.join(names)} (it has {', '.join(children)}). Use another scorer.",
        code="unsupported-model",
    )


@contextmanager
def outputs_of(modules: dict[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """While open, collect the latest output of each module under its name."""
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        for name, module in modules.items():
            hook = module.register_forward_hook(lambda _, __, output, name=name: found.update({name: output}))
            stack.callback(hook.remove)
        yield found


def first_tensor(output: Any) -> Tensor:
    """The main output of a module that may return several."""
    return output if isinstance(output, Tensor) else output[0]


OUTPUT = "its output"
"""Name of the output of the whole model."""

Readings = dict[str, Tensor]
"""Output ``[rows x t, d]`` of each part, by name, in the order of computation."""


def readings(model: nn.Module, call: Callable[[], Any], shape: tuple[int, int]) -> Readings:
    """Outputs of all layers, of their children and of the model in one call.

    Children are read too: a difference is large there, but small against the residual stream after the layer.

    Args:
        model: The model.
        call: Calls the model.
        shape: Rows and tokens of the call; outputs of other shapes are not values per token and are skipped.
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
        for name, layer in _layers(model):
            children = ((f"{name}.{child}", part) for child, part in layer.named_children())
            for full_name, module in ((name, layer), *children):
                stack.callback(module.register_forward_hook(keep(full_name)).remove)
        rows = _rows(call(), shape)
    return found if rows is None else {**found, OUTPUT: rows}


def largest_difference(first: Readings, second: Readings) -> tuple[str, float]:
    """The part that differs most, and by how much relative to its largest value; NaN if a value is not finite."""
    every = [(name, _difference(first[name], second[name])) for name in first if name in second]
    return max(every, key=lambda item: (item[1] != item[1], item[1]), default=("nothing", float("nan")))


def first_difference(first: Readings, second: Readings) -> str | None:
    """The first part whose outputs are not equal to the bit."""
    return next((name for name in first if not torch.equal(first[name], second[name])), None)


def _difference(first: Tensor, second: Tensor) -> float:
    first, second = first.float(), second.float()
    largest = float(second.abs().max())
    difference = float((first - second).abs().max())
    return difference if largest == 0 else difference / largest


def _rows(output: Any, shape: tuple[int, int]) -> Tensor | None:
    """Main output of a part with one row per token, or None.  -> [rows x t, d]"""
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
    """Elements of the outermost module lists; lists inside a layer, such as experts, are not layers."""
    lists: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{other}.") for other in lists):
            lists.append(name)
            yield from ((f"{name}.{place}", layer) for place, layer in enumerate(module))


HALF = (torch.bfloat16, torch.float16)


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """While open, a model in half precision computes in float32.

    A layer is cast only while it runs, so the memory for a second copy of the model is not needed. The parameters stay
    the same objects.
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

    with ExitStack() as stack:
        stack.callback(lambda: [call.close() for call in open_calls])
        stack.callback(layer.register_forward_pre_hook(begin).remove)
        # always_call: the weights must be restored after an error in the layer as well.
        stack.callback(layer.register_forward_hook(end, always_call=True).remove)
        yield


@contextmanager
def _widened(module: nn.Module, without: set[int] | None = None) -> Iterator[None]:
    tensors = {id(item): item for item in (*module.parameters(), *module.buffers())}  # shared ones once
    narrow = [
        tensor for key, tensor in tensors.items() if tensor.dtype in HALF and key not in (without or ())
    ]
    before = [tensor.data for tensor in narrow]
    for tensor in narrow:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, data in zip(narrow, before, strict=True):
            tensor.data = data
