"""Layers of any model of transformers, and what they put out while it runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
