"""Loads the frozen models that rank replies."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from tokenward.errors import UserError
from tokenward.models.identity import loading_reason, resolve
from tokenward.models.loading import DTYPES, check_finite, device_of
from tokenward.models.plausible import check_config


def from_pretrained(kind: Any, name: str, what: str, advice: str, **settings: Any) -> Any:
    """``kind.from_pretrained`` of a transformers auto class, with errors that name the model and what it should be."""
    source = resolve(name)
    try:
        return kind.from_pretrained(source, **settings)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged files end in any exception
        raise UserError(
            f"no {what} could be loaded from {name!r}: {loading_reason(error)} {advice}",
            code="model-not-loaded",
        ) from error


def load_frozen(
    kind: Any,
    name: str,
    what: str,
    advice: str,
    *,
    dtype: str,
    device: str,
    trust_remote_code: bool = False,
) -> Any:
    """A complete model of an auto class in evaluation mode, on a device (``auto``: the GPU if there is one).

    Raises:
        UserError: it cannot be loaded, its config has sizes that no model has, or some of its weights are missing or not finite.
    """
    trust = {"trust_remote_code": trust_remote_code}
    check_config(from_pretrained(AutoConfig, name, what, advice, **trust), name)
    model, found = from_pretrained(
        kind, name, what, advice, dtype=DTYPES[dtype], output_loading_info=True, **trust
    )
    missing = found["missing_keys"]
    if missing:  # transformers initializes them at random and only logs a warning
        raise UserError(
            f"{name} has no weights for {len(missing)} parts of a {what}, such as {min(missing)}; they would be random. {advice}",
            code="missing-weights",
        )
    check_finite(model, name)
    return nn.Module.to(model, device_of(device)).eval()
