"""Weights of which each process holds a part: FSDP2's and DeepSpeed ZeRO-3's.

Both keep a model's own modules, so most code need not know about them. What does need to know is here: a module's class,
whether its weights are in parts, how to read and write one weight as a whole, and who loads them.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TypeGuard, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations import deepspeed as deepspeed_settings

M = TypeVar("M", bound=nn.Module)

_FIRST_LOADS = "FSDP_CPU_RAM_EFFICIENT_LOADING"
"""Set by accelerate and transformers: the first process of each machine reads the weights, and FSDP2's preparation spreads them."""

_UNREAD = "_tokenward_unread"
"""Attribute of a model with the hook of :func:`leave_unread`."""


@contextmanager
def loading_whole() -> Iterator[None]:
    """Context in which transformers loads whole weights in every process, whatever was set up for training.

    Models also score, and are tested, before anything is cut.
    """
    before, config = os.environ.get(_FIRST_LOADS), deepspeed_settings._hf_deepspeed_config_weak_ref
    os.environ[_FIRST_LOADS] = "false"
    deepspeed_settings._hf_deepspeed_config_weak_ref = None  # ZeRO-3 would cut the weights at once
    try:
        yield
    finally:
        deepspeed_settings._hf_deepspeed_config_weak_ref = config
        if before is None:
            os.environ.pop(_FIRST_LOADS, None)
        else:
            os.environ[_FIRST_LOADS] = before


def leave_unread(module: nn.Module) -> None:
    """Mark a model whose weights have memory but no values: those of the first process are spread when the training begins.

    Until :func:`has_read`, a forward pass raises RuntimeError, since it would compute with whatever is in that memory.
    """

    def refuse(module: nn.Module, inputs: object) -> None:
        raise RuntimeError(
            "the weights of this model are in the first process, which has not spread them yet"
        )

    vars(module)[_UNREAD] = module.register_forward_pre_hook(refuse)


def has_read(module: nn.Module) -> None:
    """Remove the mark of :func:`leave_unread`, once the engine has spread the weights."""
    for part in module.modules():
        if handle := vars(part).pop(_UNREAD, None):
            handle.remove()


def is_unread(module: nn.Module) -> bool:
    """Whether a model has the mark of :func:`leave_unread`."""
    return any(_UNREAD in vars(part) for part in module.modules())


def is_empty(module: nn.Module) -> bool:
    """Whether a model has no weights of its own yet, because another process has read them."""
    return is_unread(module) or any(weight.is_meta for weight in module.parameters())


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module as it was before FSDP2, which makes a subclass of it."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def is_exactly(module: nn.Module | None, kind: type[M]) -> TypeGuard[M]:
    """Whether a module is of a class and of no class derived from it, but for that of FSDP2."""
    return module is not None and class_of(module) is kind


def in_parts(weight: Tensor) -> bool:
    """Whether each process holds a part of a weight only."""
    return isinstance(weight, DTensor) or _by_deepspeed(weight)


def _by_deepspeed(weight: Tensor) -> bool:
    return "ds_id" in vars(weight)  # ZeRO-3 gives one to each weight that it has partitioned


def is_sharded(module: nn.Module) -> bool:
    """Whether a forward pass of a module is collective: every process must take part in it."""
    return any(isinstance(part, FSDPModule) for part in module.modules()) or any(
        map(in_parts, module.parameters())
    )


def reading(module: nn.Module) -> AbstractContextManager[object]:
    """Context of forward passes without gradient.

    In inference mode, sharding would keep weights that no later training step could change.
    """
    return torch.no_grad() if is_sharded(module) else torch.inference_mode()


@contextmanager
def _gathered(weight: Tensor, *, written: bool) -> Iterator[None]:
    import deepspeed  # an extra

    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0 if written else None):
        yield


def is_first_process() -> bool:
    """Whether this is the only process of a training, or the first of several."""
    return not dist.is_initialized() or dist.get_rank() == 0


def whole(weight: Tensor) -> Tensor | None:
    """A whole copy of a weight on the CPU.

    If the weight is in parts, all processes must call this; the first one gets the copy and the others get None.
    """
    if _by_deepspeed(weight):
        with _gathered(weight, written=False):
            return weight.detach().cpu().clone() if is_first_process() else None
    if not isinstance(weight, DTensor):
        return weight.detach().cpu().clone()
    full = cast(DTensor, weight.detach()).full_tensor()
    return full.cpu().clone() if is_first_process() else None


@torch.no_grad()
def put(weight: Tensor, value: Tensor | None) -> None:
    """Give a weight another value: that of :func:`whole`, under the same conditions."""
    if _by_deepspeed(weight):
        with _gathered(weight, written=True):
            if value is not None:
                weight.data.copy_(value)
    elif isinstance(weight, DTensor):
        given = torch.empty(weight.shape) if value is None else value  # the first process's is used
        given = given.to(weight.device, weight.dtype)
        weight.copy_(distribute_tensor(given, weight.device_mesh, weight.placements))
    else:
        assert value is not None
        weight.data.copy_(value)


def reshard(module: nn.Module) -> None:
    """Release what FSDP2 has gathered, so that a module's parameters are those that the optimizer knows."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def whole_state(module: nn.Module) -> dict[str, Tensor] | None:
    """Whole copies of a module's state on the CPU, in the first process; nothing in the others.

    None if no weight is in parts, so that the module can be saved as it is. All processes must call this.
    """
    if not is_sharded(module):
        return None
    reshard(module)
    copies: dict[int, Tensor | None] = {}  # weights that several modules share have one copy
    found: dict[str, Tensor] = {}
    for name, weight in module.state_dict(keep_vars=True).items():
        if id(weight) not in copies:
            copies[id(weight)] = whole(weight)
        copy = copies[id(weight)]
        found |= {} if copy is None or not is_first_process() else {name: copy}
    return found


def weights_within(module: nn.Module, part: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a part of a module, by their names in the part."""
    prefix = next(name for name, found in module.named_modules() if found is part) + "."
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
