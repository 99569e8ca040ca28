"""What the engines of several processes (DDP, FSDP2, DeepSpeed) do differently in a training step and when a model is saved."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainingArguments

from tokenward.distributed import any_of
from tokenward.errors import UserError
from tokenward.models.forward import FrozenReference
from tokenward.models.sharding import class_of, has_read, is_unread
from tokenward.training.resume import Kind


def check_cut(model: nn.Module, arguments: TrainingArguments) -> None:
    """Refuse a model that was cut when it was loaded, such as by tensor parallelism, and FSDP of one process.

    Raises:
        UserError: as above.
    """
    if arguments.fsdp and arguments.world_size == 1:
        raise UserError(
            "fsdp shares a model among several processes, but this training has one. Start it with accelerate launch or torchrun, or "
            "leave fsdp out.",
            code="unsupported-parallelism",
        )
    parts = [name for name, weight in model.named_parameters() if isinstance(weight, DTensor)]
    if parts and not isinstance(model, FSDPModule):
        raise UserError(
            f"the weights of the model are in parts before the training, such as {parts[0]}: it was loaded with tp_plan or "
            "distributed_config. The head needs whole rows of the vocabulary. Load the model without them, and share it among "
            "processes with fsdp=True or deepspeed.",
            code="unsupported-parallelism",
        )


def check_engine(accelerator: Accelerator, arguments: TrainingArguments) -> None:
    """Refuse an engine that would not do what the arguments say.

    Raises:
        UserError: FSDP on a CPU, which accelerate would replace by DDP; FSDP's first version; or processes that share more than the
            data.
    """
    kind = accelerator.distributed_type
    if arguments.fsdp and kind != DistributedType.FSDP:
        raise UserError(
            "fsdp is set, but accelerate runs FSDP on several GPUs only, and would train every process's own whole copy of the "
            f"model here ({kind.value}). Leave fsdp out.",
            code="unsupported-parallelism",
        )
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError(
            "FSDP's first version is not supported, because it replaces the model's weights by flat ones. Use fsdp_version: 2 (in "
            "fsdp_config: version: 2).",
            code="unsupported-parallelism",
        )
    shared: Any = accelerator.parallelism_config
    if shared is not None and (sizes := [shared.tp_size, shared.cp_size, shared.sp_size]) != [1, 1, 1]:
        raise UserError(
            f"tensor, context and sequence parallelism have the sizes {sizes}, but here processes share the data only. Set them to 1, "
            "and use FSDP2 or DeepSpeed for a model that does not fit.",
            code="unsupported-parallelism",
        )


def cuts_weights(arguments: TrainingArguments) -> bool:
    """Whether a training cuts the weights of its model, by these arguments or by accelerate's config.

    Such an engine can spread the weights of the first process, so that no other needs to read them.
    """
    plugin: Any = getattr(arguments, "deepspeed_plugin", None)
    return arguments.world_size > 1 and (
        bool(arguments.fsdp) or (plugin is not None and plugin.zero_stage == 3)
    )


def spread_weights(accelerator: Accelerator, *models: nn.Module) -> None:
    """Prepare the engine to spread the weights of the first process, if another one has not read them.

    ZeRO-3 always does. All processes must call this.
    """
    if not any_of(any(map(is_unread, models))):
        return
    deepspeed: Any = accelerator.state.deepspeed_plugin
    if accelerator.is_fsdp2:
        plugin: Any = accelerator.state.fsdp_plugin
        plugin.cpu_ram_efficient_loading = True
    elif deepspeed is None or deepspeed.zero_stage != 3:
        raise RuntimeError("only FSDP2 and ZeRO-3 spread the weights of the first process")


class WeightsSpread(TrainerCallback):
    """Notes that a model has its weights: engines spread them just before a training begins."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        has_read(self._module)


def keep_gradients_in_parts(accelerator: Accelerator, arguments: TrainingArguments) -> None:
    """Under FSDP2, exchange gradients after each pass, unless ``gradient_accumulation_kwargs`` say otherwise.

    Between passes without an exchange, every process would hold the whole gradient of the model.
    """
    config: Any = arguments.accelerator_config
    asked = config.gradient_accumulation_kwargs or {}
    if accelerator.is_fsdp2 and "sync_each_batch" not in asked:
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True


def between_passes(accelerator: Accelerator, model: nn.Module) -> AbstractContextManager[object]:
    """Context of a pass after which another one follows in the same step."""
    each = accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
    return nullcontext() if each or _engine(model) is not None else accelerator.no_sync(model)


def complete_deepspeed(accelerator: Accelerator, arguments: TrainingArguments) -> None:
    """Fill the gaps of a DeepSpeed config whose defaults would contradict the training arguments.

    transformers fills in what is ``auto``. Without a value, DeepSpeed would not clip gradients, whatever ``max_grad_norm`` is, and
    ZeRO-3 would save no weights.
    """
    plugin: Any = accelerator.state.deepspeed_plugin
    if plugin is None:
        return
    config = plugin.hf_ds_config.config
    if config.get("gradient_clipping", "auto") == "auto":
        config["gradient_clipping"] = arguments.max_grad_norm
    if config.get("zero_optimization", {}).get("stage") == 3:
        config["zero_optimization"].setdefault("stage3_gather_16bit_weights_on_model_save", True)


def written_kind(accelerator: Accelerator) -> Kind:
    """The kind of checkpoint that the engine writes."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return "deepspeed"
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin: Any = accelerator.state.fsdp_plugin
        return "fsdp parts" if "SHARDED" in str(plugin.state_dict_type) else "fsdp"
    return "plain"


def reads_universal(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed is told to read checkpoints that fit any number of processes."""
    plugin: Any = accelerator.state.deepspeed_plugin
    return plugin is not None and bool(plugin.hf_ds_config.get_value("checkpoint.load_universal"))


def _engine(model: nn.Module) -> Any:
    """The model if it is DeepSpeed's engine, else None. DeepSpeed is an extra, so it is known by its class's name."""
    return model if class_of(model).__name__ == "DeepSpeedEngine" else None


def backward(accelerator: Accelerator, model: nn.Module, loss: Tensor, *, last: bool) -> None:
    """Backward of one pass; ``last`` says that no other one follows in the step.

    accelerate would update the weights inside DeepSpeed's last backward pass, and DeepSpeed would divide the loss by the
    accumulated batches, by which it is already divided.
    """
    engine = _engine(model)
    if engine is None:
        accelerator.backward(loss)
        return
    engine.set_gradient_accumulation_boundary(is_boundary=last)
    engine.backward(loss, scale_wrt_gas=False)


def finish(model: nn.Module, factor: Tensor | None) -> None:
    """Multiply the gradients of a finished step by a factor, if there is one; DeepSpeed then clips and updates."""
    engine = _engine(model)
    if engine is None:
        if factor is not None:
            for weight in model.parameters():
                if weight.grad is not None:
                    weight.grad.mul_(factor.to(weight.grad.device))
        return
    with nullcontext() if factor is None else _scaled(engine.optimizer, float(factor)):
        engine.step()


@contextmanager
def _scaled(optimizer: Any, factor: float) -> Iterator[None]:
    """While open, DeepSpeed's optimizer multiplies gradients by a factor before it clips them.

    Gradients are in parts and in several buffers, but each is divided by the loss scale.
    """
    if factor:  # at 0 nothing counted, and the gradients are 0
        optimizer.loss_scale = optimizer.loss_scale / factor
    yield
    if factor:
        optimizer.loss_scale = optimizer.loss_scale * factor


def prepare_reference(accelerator: Accelerator, reference: FrozenReference | None) -> nn.Module | None:
    """Shard a frozen reference model as the policy is sharded; returns what must be kept as long as the model.

    Its head is needed while the policy's head runs, not only in its own forward pass. FSDP2 keeps the last layers whole after a
    forward pass, until a backward pass that never comes; under ZeRO-3 the head is told to stay whole in every process.
    """
    if reference is None or reference.without_adapter:
        return None
    plugin: Any = accelerator.state.deepspeed_plugin
    made: nn.Module | None = None
    if accelerator.is_fsdp2:
        made = fsdp2_prepare_model(accelerator, reference.model)
    elif plugin is not None and plugin.zero_stage == 3:
        made = _partitioned(reference.model, plugin.hf_ds_config.config)
    if made is not None:
        has_read(made)
        return made
    if plugin is not None and plugin.hf_ds_config.is_true("bf16.enabled"):
        reference.model.to(torch.bfloat16)  # as DeepSpeed casts the policy
    return None


def _partitioned(model: Any, config: Mapping[str, Any]) -> nn.Module:
    """DeepSpeed's engine of a model that does not train."""
    import deepspeed  # an extra

    own = {name: value for name, value in config.items() if name not in ("optimizer", "scheduler")}
    stage = config["zero_optimization"]
    own["zero_optimization"] = {name: value for name, value in stage.items() if value != "auto"}
    engine = deepspeed.initialize(model=model, config=own)[0]
    for weight in model.get_output_embeddings().parameters():
        # Kept once it was gathered; the second one counts until DeepSpeed's first trace of the passes ends.
        weight.ds_persist = weight.is_external_param = True
    return engine


def whole_weights(accelerator: Accelerator, wrapped: nn.Module) -> dict[str, Tensor] | None:
    """The weights of a trained model whose processes hold parts of it, whole and on the CPU.

    None if each process holds the whole model. All processes must call this; the weights come in the first one, and the others get
    nothing. Of a model with an adapter, only the adapter's weights are gathered. One weight at a time is whole on the device.
    """
    engine = _engine(wrapped)
    if accelerator.is_fsdp2:
        adapter = isinstance(wrapped, PeftModel)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=adapter)
        found: Any = get_model_state_dict(wrapped, options=options)
        return _tied(wrapped, found)
    if engine is None or engine.zero_optimization_stage() != 3:
        return None
    adapter = isinstance(engine.module, PeftModel)
    found = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=adapter)
    return _tied(engine.module, found or {})


def _tied(module: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights, with one tensor for all names of a weight that several modules share, as saving expects it."""
    named: dict[int, Tensor] = {}
    for name, weight in module.named_parameters(remove_duplicate=False):
        if name in weights:
            weights[name] = named.setdefault(id(weight), weights[name])
    return weights
