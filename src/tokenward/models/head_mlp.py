"""A small network between the last hidden state and the head of a frozen language model.

The policy of discrete prompt generation (RLPrompt, arXiv 2205.12548; TLM, arXiv 2306.00398, section 4): a frozen model with
``MLP(h)`` in place of its last hidden state ``h``. Initialized near zero, all logits start nearly equal, so that sampling
explores the whole vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tokenward.artifacts import read_json, write_json
from tokenward.errors import UserError

SETTINGS_FILE = "head_mlp.json"
WEIGHTS_FILE = "head_mlp.safetensors"


@dataclass(frozen=True, slots=True)
class HeadMLPSettings:
    """Shape and initialization of the network.

    Attributes:
        hidden: Width of its hidden layer.
        gain: Gain of the Xavier-uniform initialization.
        bias: Initial value of both biases; None as in :func:`mlp`.
        residual: Add the hidden state itself, so that training starts at the frozen model.
    """

    _: KW_ONLY
    hidden: int = 2048
    gain: float = 1e-4
    bias: float | None = None
    residual: bool = False

    def __post_init__(self) -> None:
        if self.hidden < 1 or not self.gain > 0:
            raise UserError(
                f"head_mlp needs hidden >= 1 and gain > 0, got {self.hidden} and {self.gain}. Use for example "
                "{hidden: 2048}.",
                code="out-of-range",
                key="model.head_mlp",
            )


PUBLISHED_BIAS = -1e-4
LIVE_UNITS = 8
"""Average number of hidden units that must be active at the start."""


def mlp(width: int, hidden: int, out: int, *, gain: float, bias: float | None) -> nn.Sequential:
    """Linear, ReLU, Linear, initialized near zero.

    ``bias`` None is the published -1e-4 for both, except that the hidden layer of a narrow model starts at 0: with the published
    value all of its units would be negative for every input, and only the last bias would get a gradient.
    """
    layers = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, out))
    value = PUBLISHED_BIAS if bias is None else bias
    dead = bias is None and live_units(width, hidden, gain=gain, bias=value) < LIVE_UNITS
    for layer, start in ((layers[0], 0.0 if dead else value), (layers[2], value)):
        assert isinstance(layer, nn.Linear)
        init_linear(layer, gain=gain, bias=start)
    return layers


def live_units(width: int, hidden: int, *, gain: float, bias: float) -> float:
    """Expected number of active hidden units at the start, for inputs whose features have variance 1.

    The input of a unit is then approximately normal, with mean ``bias`` and variance ``2 gain^2 width / (width + hidden)``.
    """
    spread = gain * math.sqrt(2 * width / (width + hidden))
    return hidden * math.erfc(-bias / (spread * math.sqrt(2))) / 2


def init_linear(layer: nn.Linear, *, gain: float, bias: float) -> None:
    """Xavier-uniform weights and a constant bias."""
    nn.init.xavier_uniform_(layer.weight, gain=gain)
    nn.init.constant_(layer.bias, bias)


class AdaptedHead(nn.Module):
    """A frozen output embedding after a trained network."""

    def __init__(self, head: nn.Module, width: int, settings: HeadMLPSettings) -> None:
        super().__init__()
        self.head, self.residual = head, settings.residual
        self.mlp = mlp(width, settings.hidden, width, gain=settings.gain, bias=settings.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits.  [... d] -> [... v]"""
        adapted = self.mlp(hidden.to(next(self.mlp.parameters()).dtype)).to(hidden.dtype)
        return self.head(hidden + adapted if self.residual else adapted)


def install_head_mlp(model: PreTrainedModel, settings: HeadMLPSettings) -> AdaptedHead:
    """Freeze a model and put a new network before its head.

    Raises:
        UserError: The model has no output embedding.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Module):
        raise UserError(
            f"{type(model).__name__} has no output embedding, which head_mlp needs. Use an adapter instead.",
            code="unsupported-model",
            key="model.head_mlp",
        )
    model.requires_grad_(False)
    parameter = next(model.parameters())
    adapted = AdaptedHead(head, model.config.get_text_config().hidden_size, settings)
    # The network is trained, so it is at least float32, whatever the dtype of the frozen weights.
    adapted.mlp.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))
    model.set_output_embeddings(adapted)  # type: ignore[operator]
    return adapted


def save_weights(module: nn.Module, path: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the weights of a small module, or those given."""
    found = module.state_dict() if weights is None else weights
    save_file({name: value.contiguous() for name, value in found.items()}, path)


def save_head_mlp(
    adapted: AdaptedHead,
    settings: HeadMLPSettings,
    base: str,
    folder: Path,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the network, or the weights given for it; the frozen model is stored by name only."""
    save_weights(adapted.mlp, folder / WEIGHTS_FILE, weights)
    write_json(folder / SETTINGS_FILE, {"base": base, "settings": asdict(settings)}, ascii=True)


def read_head_mlp(folder: Path) -> tuple[str, HeadMLPSettings]:
    """Name of the base model and settings from a folder of :func:`save_head_mlp`.

    Raises:
        UserError: The file is damaged.
    """
    try:
        record = read_json(folder / SETTINGS_FILE)
        return record["base"], HeadMLPSettings(**record["settings"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _damaged(folder, SETTINGS_FILE, error) from error


def load_head_mlp(model: PreTrainedModel, folder: Path) -> tuple[AdaptedHead, HeadMLPSettings]:
    """Put a saved network before the head of a model.

    Raises:
        UserError: A file is damaged or belongs to a model of another width.
    """
    _, settings = read_head_mlp(folder)
    adapted = install_head_mlp(model, settings)
    try:
        adapted.mlp.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise _damaged(folder, WEIGHTS_FILE, error) from error
    return adapted, settings


def _damaged(folder: Path, file: str, error: Exception) -> UserError:
    return UserError(
        f"cannot load the head_mlp in {folder} from {file}: {type(error).__name__} {error}. Copy the whole folder again, or "
        "run the stage that wrote it again.",
        code="damaged-file",
    )
