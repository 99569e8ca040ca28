"""Whether a device computes in bfloat16, or only imitates it."""

from collections.abc import Mapping
from typing import Any

import torch

INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16")
"""What torch calls a processor's instructions for products in bfloat16."""


def imitates_bfloat16(device: torch.device, processor: Mapping[str, Any] | None = None) -> bool:
    """Whether products in bfloat16 are slower than in float32 here: a processor without instructions for them.

    On one with AVX2 alone a linear layer took seven times as long forward, forty times backward (``python -m benchmarks.bfloat16``).

    Args:
        device: Where the model is.
        processor: Instructions by name; None asks torch.
    """
    if device.type != "cpu":
        return False
    known = torch.cpu.get_capabilities() if processor is None else processor
    return not any(known.get(name, False) for name in INSTRUCTIONS)
