"""Memory and time of one of several devices that train or score together, estimated from sizes alone.

Nothing here is measured. The counts of :mod:`tokenward.ops.costs` for one process are divided as each engine divides them:

- ``ddp``: every device has everything, and buckets for the gradients that it sends.
- ``fsdp2``: weights, gradients, moments and a frozen reference are divided. The layer in use and the next one are whole, and so
  is what is outside of the layers: embedding and head.
- ``zero2``: DeepSpeed divides gradients and moments, and the weights are whole. Under bfloat16 these are bfloat16, and each device has
  a float32 copy of its part.
- ``zero3``: DeepSpeed divides everything, and keeps up to :data:`LIVE` numbers whole.
"""

from typing import Literal, NamedTuple, get_args

from tokenward.ops.costs import (
    FLOAT,
    HALF,
    MOMENTS,
    Memory,
    ModelSizes,
    NumberTypes,
    Work,
    forward_memory,
    training_memory,
)

Engine = Literal["ddp", "fsdp2", "zero2", "zero3"]
ENGINES: tuple[str, ...] = get_args(Engine)

WHOLE_LAYERS = 2  # the layer in use, and the next one, which is gathered meanwhile
BUCKET = 500_000_000  # numbers; DeepSpeed's default of reduce_bucket_size
BUCKETS = 2  # one is filled while the other is sent
LIVE = 1_000_000_000  # numbers; DeepSpeed's default of stage3_max_live_parameters


class Devices(NamedTuple):
    """Equal devices, one process each.

    Attributes:
        count: Number of devices.
        engine: What divides the training among them.
        memory: Bytes of each.
        rate: Operations per second that one sustains in the number type of the products.
        link: Bytes per second that one sends while it receives as many.
    """

    count: int  # pyright: ignore[reportIncompatibleMethodOverride]  # tuple's own is of no use here
    engine: Engine
    memory: float
    rate: float
    link: float


class DeviceMemory(NamedTuple):
    """Peak memory of a device in bytes, by use; ``whole`` is what is gathered from the other devices or sent to them."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    reference: float
    whole: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return sum(self)


def training_bytes(
    sizes: ModelSizes,
    work: Work,
    types: NumberTypes,
    devices: Devices,
    *,
    checkpointing: bool = False,
    reference: bool = False,
) -> DeviceMemory:
    """Bytes of a device in a training step with AdamW.

    Args:
        sizes: Sizes of the model.
        work: The largest pass of a device.
        types: Bytes per number.
        devices: The devices.
        checkpointing: Whether only the inputs of layers are saved.
        reference: Whether a frozen model of the same size is in memory too.
    """
    one = training_memory(sizes, work, types, checkpointing=checkpointing)
    frozen = sizes.weights * types.weights if reference else 0.0
    if devices.count == 1:
        return DeviceMemory(*one, frozen, 0.0)
    state = _STATE[devices.engine](sizes, types, one, frozen, devices.count)
    return DeviceMemory(
        state.weights,
        state.gradients,
        state.optimizer,
        one.activations,
        one.logits,
        state.reference,
        state.whole,
    )


class _State(NamedTuple):
    weights: float
    gradients: float
    optimizer: float
    reference: float
    whole: float


def _ddp(sizes: ModelSizes, types: NumberTypes, one: Memory, frozen: float, count: int) -> _State:
    return _State(one.weights, one.gradients, one.optimizer, frozen, one.gradients)


def _fsdp2(sizes: ModelSizes, types: NumberTypes, one: Memory, frozen: float, count: int) -> _State:
    whole = types.products * (gathered(sizes) + _whole_gradients(sizes))
    if frozen:  # its layers are gathered in turns with those of the policy
        whole += types.products * gathered(sizes)
    weights = sizes.weights * types.weights
    return _State(weights / count, one.gradients / count, one.optimizer / count, frozen / count, whole)


def _zero2(sizes: ModelSizes, types: NumberTypes, one: Memory, frozen: float, count: int) -> _State:
    held, master = _deepspeed(types)
    own = sizes.trained / count
    sent = BUCKETS * held * min(BUCKET, sizes.trained)
    return _State(
        sizes.weights * held + own * master,
        own * held,
        MOMENTS * own * FLOAT,
        frozen / types.weights * held,
        sent,
    )


def _zero3(sizes: ModelSizes, types: NumberTypes, one: Memory, frozen: float, count: int) -> _State:
    held, master = _deepspeed(types)
    own = sizes.trained / count
    live = max(gathered(sizes), min(LIVE, sizes.weights))
    sent = BUCKETS * held * min(BUCKET, sizes.trained)
    return _State(
        sizes.weights / count * held + own * master,
        own * held,
        MOMENTS * own * FLOAT,
        frozen / types.weights * held / count,
        held * live + sent,
    )


def _deepspeed(types: NumberTypes) -> tuple[int, int]:
    """Bytes of a weight, and of DeepSpeed's float32 copy of a trained one."""
    return (HALF, FLOAT) if types.products == HALF else (FLOAT, 0)


_STATE = {"ddp": _ddp, "fsdp2": _fsdp2, "zero2": _zero2, "zero3": _zero3}


def gathered(sizes: ModelSizes) -> float:
    """Weights that are whole at once where they are divided: some layers, and all that is outside of the layers."""
    return WHOLE_LAYERS * sizes.products / sizes.layers + outside(sizes)


def outside(sizes: ModelSizes) -> int:
    """Weights outside of the layers: embedding and head."""
    frozen = sizes.weights - sizes.trained if sizes.trained < sizes.weights else sizes.weights
    return frozen - sizes.products


def _whole_gradients(sizes: ModelSizes) -> float:
    """Gradients that are whole until they have been sent: of one layer and of what is outside, as far as it is trained."""
    return (sizes.products / sizes.layers + outside(sizes)) * sizes.trained / sizes.weights


def scoring_bytes(sizes: ModelSizes, work: Work, types: NumberTypes) -> DeviceMemory:
    """Bytes of a device that scores: each has a whole model and a part of the rows."""
    one = forward_memory(sizes, work, types)
    return DeviceMemory(*one, 0.0, 0.0)


def sent_bytes(
    sizes: ModelSizes, types: NumberTypes, devices: Devices, *, passes: float, updates: float
) -> float:
    """Bytes that a device sends in a training of so many forward passes of a device and updates."""
    share = (devices.count - 1) / devices.count
    if devices.engine == "ddp":
        return 2 * share * updates * sizes.trained * types.weights
    number = types.products
    if (
        devices.engine == "zero2"
    ):  # gradients are divided after each pass, weights are gathered after each update
        return share * number * (passes * sizes.trained + updates * sizes.trained)
    return share * number * passes * (2 * sizes.weights + sizes.trained)  # gathered in both directions


def training_seconds(operations: float, sent: float, devices: Devices) -> float:
    """Time of a training: that of computing or that of sending, whichever is longer. The other one is taken to be hidden.

    ``operations`` are those of all devices together, ``sent`` the bytes of one.
    """
    return max(operations / (devices.count * devices.rate), sent / devices.link)
