"""What a stage may train from: whole weights, or an adapter on a base, of which whole weights are made once."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

from peft import PeftModel
from transformers import PreTrainedModel

from tokenward.errors import UserError
from tokenward.models.loading import load_model
from tokenward.models.merging import merged
from tokenward.models.outputs import TOLERANCE, difference, next_log_probabilities
from tokenward.models.places import ADAPTER_FILE, config_of, model_fingerprint, no_base, parts_of, resolve
from tokenward.tokens.template import Style

FOLDER = "merged"
"""Beside the stages of a run: the whole weights of adapters that it starts from."""


def is_adapter(name: str) -> bool:
    """Whether a model is a folder with a PEFT adapter."""
    return (Path(name).expanduser() / ADAPTER_FILE).is_file()


def whole_start(
    name: str,
    run: Path,
    *,
    style: Style,
    device: str,
    trust_remote_code: bool,
    say: Callable[[str], object],
) -> str:
    """A model with whole weights: what was named, or a folder in the run with its adapter merged into its base.

    Args:
        name: The model, as the recipe says it.
        run: The run's folder.
        style: How its prompts are written.
        device: Where to compute.
        trust_remote_code: Run code that comes with the model.
        say: Shows a line.

    Raises:
        UserError: the adapter cannot be merged, or says something else when it is.
    """
    if not is_adapter(name):
        return name
    target = run / FOLDER / model_fingerprint(name)[:16]
    if target.is_dir():
        return str(target)
    model = load_model(name, device=device, packing="none", trust_remote_code=trust_remote_code)
    before = next_log_probabilities(model, model.template(style))
    scratch = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    cast(PreTrainedModel, merged(cast(PeftModel, model.model), name)).save_pretrained(scratch)
    model.tokenizer.save_pretrained(scratch)
    again = load_model(str(scratch), device=device, packing="none", trust_remote_code=trust_remote_code)
    found = difference(before, next_log_probabilities(again, again.template(style)))
    if not found <= TOLERANCE["float32"]:
        raise UserError(
            f"the adapter {name} merged into its base says something else: log-probabilities differ by up to {found:.3g} nats. "
            "Name a whole model."
        )
    scratch.rename(target)
    say(
        f"  {name} is an adapter on {parts_of(resolve(name)).base}: it was merged into whole weights, {target}, from which this "
        f"run starts (log-probabilities differ by {found:.2g} nats at most)"
    )
    return str(target)


def check_start(name: str, *, trust_remote_code: bool) -> None:
    """Refuse what no training can start from, before a stage has run.

    Raises:
        UserError: the base of an adapter is not there, or the model is a network before a frozen one's head.
    """
    if not Path(name).expanduser().is_dir():
        return
    parts = parts_of(resolve(name))
    if parts.head_mlp is not None:
        raise UserError(
            f"{name} is a network before the head of {parts.base}, and training starts from whole weights. Name {parts.base}."
        )
    if parts.adapter is not None:
        try:
            config_of(parts.base, trust_remote_code=trust_remote_code)
        except UserError as error:
            raise UserError(no_base(name, parts.base, error)) from error
