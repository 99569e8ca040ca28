"""Modules of an objective that train with the policy: registered, optimized and saved beside it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tokenward.errors import UserError
from tokenward.models.base import TokenModel
from tokenward.models.loading import LanguageModel
from tokenward.models.sharding import put, reshard, whole
from tokenward.objectives.base import Objective, ObjectiveModule, has_module, modules_of, title_of
from tokenward.training.callbacks import write_weights

FILE = "auxiliary.safetensors"
"""Saved beside the model and in each checkpoint."""

NAME = "tokenward_auxiliary"
"""Of the submodule of the policy."""


class ObjectiveModules:
    """The modules of an objective, registered in the trained model but not saved with it.

    They are submodules of the policy, so that gradient clipping and checks see them, but no Hugging Face folder contains
    them. The objective calls them after the policy's forward, and DDP treats a parameter that its forward did not use
    as one without a gradient. DDP is therefore told to ignore them, and :meth:`exchange` averages their gradients.
    ``seed`` sets their initial weights.

    Raises:
        UserError: the model is not a language model, so it has no hidden states of known width.
    """

    def __init__(self, model: TokenModel, objective: Objective, seed: int) -> None:
        self._parts = _make_modules(model, objective, seed) if has_module(objective) else []
        self._modules = nn.ModuleList(part.module for part in self._parts)
        module = model.model
        if NAME in module._modules:  # left by an earlier training of the same model
            del module._modules[NAME]
        if self._parts:
            module.add_module(NAME, self._modules)
            left_out = {f"{NAME}.{name}" for name in self._modules.state_dict()}
            # save_pretrained leaves these out. object.__setattr__ because a PEFT wrapper would register the set elsewhere.
            known = getattr(module, "_keys_to_ignore_on_save", None) or ()
            object.__setattr__(module, "_keys_to_ignore_on_save", {*known, *left_out})
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, [*left_out])

    def __bool__(self) -> bool:
        return bool(self._parts)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Inside the context the modules need no gradient, so a new optimizer does not include them."""
        self._modules.requires_grad_(False)
        try:
            yield
        finally:
            self._modules.requires_grad_(True)

    def join(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the modules to an optimizer, each with its own learning rate and weight decay."""
        for part in self._parts:
            rate = {} if part.learning_rate is None else {"lr": part.learning_rate}
            weights = [*part.module.parameters()]
            optimizer.add_param_group({"params": weights, "weight_decay": part.weight_decay, **rate})

    def exchange(self, model: nn.Module) -> None:
        """Under DDP, average their gradients over the processes. Call once, at the end of a step.

        A weight that has a gradient in no process keeps none, so that no optimizer moves it.
        """
        if not self._parts or not isinstance(model, DistributedDataParallel):
            return
        weights = [*self._modules.parameters()]
        present = torch.tensor(
            [float(weight.grad is not None) for weight in weights], device=weights[0].device
        )
        dist.all_reduce(present)
        for weight, count in zip(weights, present.tolist(), strict=True):
            if count:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
                dist.all_reduce(weight.grad)
                weight.grad /= dist.get_world_size()

    def save(self, folder: Path) -> None:
        """Write the weights, if there are any, in the first process. All processes must call this."""
        if self._parts:
            write_weights({name: whole(value) for name, value in self._state().items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Load the weights that :meth:`save` wrote."""
        if self._parts:
            saved = load_file(folder / FILE)
            for name, value in self._state().items():
                put(value, saved[name])

    def _state(self) -> dict[str, Tensor]:
        reshard(self._modules)
        return self._modules.state_dict(keep_vars=True)


def _make_modules(model: TokenModel, objective: Objective, seed: int) -> Sequence[ObjectiveModule]:
    if not isinstance(model, LanguageModel):
        raise UserError(
            f"{title_of(objective)} trains a module on the hidden states of a language model, but this model is a "
            f"{type(model).__name__}. Use it for the oracle or the policy.",
            code="not-a-language-model",
        )
    config = model.model.config.get_text_config()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = modules_of(objective, config.hidden_size, config.num_hidden_layers)
    # Trained weights are never coarser than float32, whatever the policy's dtype.
    dtype = torch.promote_types(model.dtype, torch.float32)
    for part in parts:
        part.module.to(model.device, dtype)
    return parts
