"""A small network between the last hidden state and the head of a frozen language model.

The policy of discrete prompt generation (RLPrompt, arXiv 2205.12548; TLM, arXiv 2306.00398, section 4): a
frozen model, ``MLP(h)`` in place of its last hidden state ``h``, and the frozen head. With an initialisation near
zero all logits begin nearly equal, so sampling explores the whole vocabulary.
"""

import math
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
    """Shape and start of the network.

    Attributes:
        hidden: Width of its one hidden layer.
        gain: Of the Xavier-uniform initialisation.
        bias: What both biases begin with; null as in :func:`mlp`.
        residual: Add the hidden state itself, so that training begins at the frozen model.
    """

    _: KW_ONLY
    hidden: int = 2048
    gain: float = 1e-4
    bias: float | None = None
    residual: bool = False

    def __post_init__(self) -> None:
        if self.hidden < 1 or not self.gain > 0:
            raise UserError(
                f"model.head_mlp needs hidden >= 1 and gain > 0, got {self.hidden} and {self.gain}. "
                "Write head_mlp: {hidden: 2048}."
            )


PUBLISHED_BIAS = -1e-4
LIVE_UNITS = 8
"""Fewest units of a hidden layer that a state should find above 0 at the start, on average."""


def mlp(width: int, hidden: int, out: int, *, gain: float, bias: float | None) -> nn.Sequential:
    """Linear, ReLU, Linear, begun near zero.

    Args:
        width: Of the states that it reads.
        hidden: Of its hidden layer.
        out: Of what it gives.
        gain: Of the Xavier-uniform initialisation.
        bias: What both biases begin with. None is -1e-4, as published, but 0 in a hidden layer that would be dead with it:
            all of its units below 0 whatever is read, so that nothing but the last bias has a gradient.
    """
    layers = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, out))
    own = PUBLISHED_BIAS if bias is None else bias
    dead = bias is None and live_units(width, hidden, gain=gain, bias=own) < LIVE_UNITS
    for layer, begun in ((layers[0], 0.0 if dead else own), (layers[2], own)):
        assert isinstance(layer, nn.Linear)
        init_linear(layer, gain=gain, bias=begun)
    return layers


def live_units(width: int, hidden: int, *, gain: float, bias: float) -> float:
    """Units of the hidden layer that begin above 0, on average over states whose features are of size 1.

    What enters a unit is then the bias and a sum of variance ``2 gain^2 width / (width + hidden)``, near to normal.
    """
    spread = gain * math.sqrt(2 * width / (width + hidden))
    return hidden * math.erfc(-bias / (spread * math.sqrt(2))) / 2


def init_linear(layer: nn.Linear, *, gain: float, bias: float) -> None:
    """Xavier-uniform weights of a gain, one number for every bias."""
    nn.init.xavier_uniform_(layer.weight, gain=gain)
    nn.init.constant_(layer.bias, bias)


class AdaptedHead(nn.Module):
    """A frozen output embedding behind a trained network.

    Args:
        head: The model's own output embedding.
        width: Of its hidden states.
        settings: Of the network.
    """

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
        UserError: the model has no output embedding of its own.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Module):
        raise UserError(
            f"{type(model).__name__} has no output embedding that head_mlp could stand before. Use adapter instead."
        )
    model.requires_grad_(False)
    width = model.config.get_text_config().hidden_size
    parameter = next(model.parameters())
    adapted = AdaptedHead(head, width, settings)
    # The network is trained, so it is never coarser than float32, whatever the frozen weights are.
    adapted.mlp.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))
    model.set_output_embeddings(adapted)  # type: ignore[operator]
    return adapted


def save_head_mlp(adapted: AdaptedHead, settings: HeadMLPSettings, base: str, folder: Path) -> None:
    """Write the network alone; the frozen model is named, not copied."""
    save_file(
        {name: value.contiguous() for name, value in adapted.mlp.state_dict().items()}, folder / WEIGHTS_FILE
    )
    write_json(folder / SETTINGS_FILE, {"base": base, "settings": asdict(settings)}, ascii=True)


def read_head_mlp(folder: Path) -> tuple[str, HeadMLPSettings]:
    """The base model's name and the settings that :func:`save_head_mlp` wrote.

    Raises:
        UserError: the file is broken.
    """
    try:
        record = read_json(folder / SETTINGS_FILE)
        return record["base"], HeadMLPSettings(**record["settings"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(_unreadable(folder, SETTINGS_FILE, error)) from error


def load_head_mlp(model: PreTrainedModel, folder: Path) -> AdaptedHead:
    """Put a saved network before a model's head.

    Raises:
        UserError: its files are broken, or are of a model of another width.
    """
    _, settings = read_head_mlp(folder)
    adapted = install_head_mlp(model, settings)
    try:
        adapted.mlp.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(_unreadable(folder, WEIGHTS_FILE, error)) from error
    return adapted


def _unreadable(folder: Path, file: str, error: Exception) -> str:
    return (
        f"the network before the head in {folder} cannot be read from {file}: {type(error).__name__} {error}. Copy the "
        "whole folder again, or run the stage that made it again."
    )
