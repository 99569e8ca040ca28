"""Resuming from a checkpoint that another engine, or another number of processes, has written.

transformers reads a checkpoint as the engine at hand writes it, and takes what it does not find for not needed: weights would
continue without the optimizer's moments. So the kind of a checkpoint is looked at first. What can be carried over is written
again, as the engine at hand would have written it; the rest is refused.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from tokenward.errors import UserError
from tokenward.models.sharding import is_first_process
from tokenward.training.objective_modules import FILE as AUXILIARY
from tokenward.training.objective_modules import NAME

Kind = Literal["plain", "fsdp", "fsdp parts", "deepspeed"]
"""How a checkpoint holds weights and optimizer: as one process and DDP do, as FSDP does (whole or in parts), or as DeepSpeed does."""

WEIGHTS, OPTIMIZER = "pytorch_model_fsdp.bin", "optimizer.bin"
PLAIN_OPTIMIZER = "optimizer.pt"
TRANSLATED = "translated"


def kind_of(checkpoint: Path) -> Kind:
    """The engine that has written a checkpoint."""
    if any(checkpoint.glob("global_step*")):
        return "deepspeed"
    if (checkpoint / OPTIMIZER).is_file():
        return "fsdp"
    return "fsdp parts" if any(checkpoint.glob("optimizer_*/")) else "plain"


def processes_of(checkpoint: Path) -> int:
    """How many processes have written a checkpoint."""
    return len([*checkpoint.glob("rng_state_*.pth")]) or 1


def check_resumable(checkpoint: Path, wanted: Kind, processes: int, *, universal: bool) -> None:
    """Refuse a checkpoint that the engine at hand cannot continue from.

    Args:
        checkpoint: The checkpoint.
        wanted: The kind that the engine at hand writes.
        processes: Number of processes of the training.
        universal: Whether DeepSpeed is told to read universal checkpoints.

    Raises:
        UserError: it cannot.
    """
    found, before = kind_of(checkpoint), processes_of(checkpoint)
    whole = (
        "Or start a new training from its weights: pass the checkpoint's folder as the model, without resume."
    )
    if "deepspeed" in (found, wanted) and found != wanted:
        raise UserError(
            f"{checkpoint} was written {_by(found)}, and this training runs {_by(wanted)}, which cannot read its optimizer. Resume with the "
            f"engine that wrote it. {whole}",
            code="unusable-checkpoint",
        )
    if found == "deepspeed" and before != processes and not universal:
        raise UserError(
            f"{checkpoint} was written by {before} processes of DeepSpeed, and this training has {processes}: DeepSpeed cuts the optimizer's "
            f"state by the number of processes. Resume with {before} processes, or convert it (ds_to_universal.py of DeepSpeed) and set "
            f"checkpoint: {{load_universal: true}} in DeepSpeed's config. {whole}",
            code="unusable-checkpoint",
        )
    if found == "fsdp parts" != wanted or wanted == "fsdp parts" != found:
        raise UserError(
            f"{checkpoint} was written {_by(found)}, and this training runs {_by(wanted)}. Resume with the same state_dict_type. {whole}",
            code="unusable-checkpoint",
        )


def _by(kind: Kind) -> str:
    names = {
        "plain": "by one process or DDP",
        "fsdp": "by FSDP with state_dict_type FULL_STATE_DICT",
        "fsdp parts": "by FSDP with state_dict_type SHARDED_STATE_DICT",
        "deepspeed": "by DeepSpeed",
    }
    return names[kind]


@contextmanager
def translated(
    checkpoint: Path, wanted: Kind, processes: int, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[Path]:
    """A folder from which the engine at hand resumes: the checkpoint, or one that says the same in the engine's own form.

    All processes must call this, and meet between making and reading the folder. ``optimizer`` is one for ``model`` before either is
    wrapped. A process that has no state of random numbers of its own gets that of the first one.
    """
    if kind_of(checkpoint) == wanted and processes_of(checkpoint) == processes:
        yield checkpoint
        return
    target, found = checkpoint / TRANSLATED, kind_of(checkpoint)
    if is_first_process():
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        _link(checkpoint, target, processes, [] if found == wanted else [WEIGHTS, OPTIMIZER, PLAIN_OPTIMIZER])
        names = optimized_names(model, optimizer)
        if (found, wanted) == ("plain", "fsdp"):
            torch.save(named_weights(checkpoint, model), target / WEIGHTS)
            if (checkpoint / PLAIN_OPTIMIZER).is_file():  # not with save_only_model
                torch.save(by_name(_read(checkpoint / PLAIN_OPTIMIZER), names), target / OPTIMIZER)
        if (found, wanted) == ("fsdp", "plain"):
            torch.save(by_number(_read(checkpoint / OPTIMIZER), names), target / PLAIN_OPTIMIZER)
    if processes > 1:
        dist.barrier()
    yield target
    if is_first_process():
        shutil.rmtree(target, ignore_errors=True)


def _link(checkpoint: Path, target: Path, processes: int, left_out: Sequence[str]) -> None:
    """Link the files of a checkpoint, and a state of random numbers for each process."""
    states = {path.name: path for path in checkpoint.glob("rng_state*.pth")}
    for path in checkpoint.iterdir():
        if path.name not in (*states, *left_out, TRANSLATED):
            (target / path.name).symlink_to(path.resolve())
    first = states.get("rng_state.pth") or states.get("rng_state_0.pth")
    if first is None:
        return
    for rank in range(processes):
        name = "rng_state.pth" if processes == 1 else f"rng_state_{rank}.pth"
        (target / name).symlink_to(states.get(name, first).resolve())


def _read(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def optimized_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the weights of an optimizer, in its order."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    return [names[id(weight)] for group in optimizer.param_groups for weight in group["params"]]


def by_name(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """An optimizer's state with names of weights in place of their numbers."""
    groups = [
        {**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]
    ]
    return {
        "state": {names[number]: value for number, value in state["state"].items()},
        "param_groups": groups,
    }


def by_number(state: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """An optimizer's state with numbers of weights in place of their names."""
    number = {name: place for place, name in enumerate(names)}
    groups = [
        {**group, "params": sorted(number[name] for name in group["params"])}
        for group in state["param_groups"]
    ]
    return {"state": {number[name]: value for name, value in state["state"].items()}, "param_groups": groups}


def named_weights(checkpoint: Path, model: nn.Module) -> dict[str, Tensor]:
    """The weights of a plain checkpoint by the names of a model's parameters: all, or those of its adapter."""
    files = [*checkpoint.glob("model*.safetensors"), *checkpoint.glob("adapter_model.safetensors")]
    saved = {name: value for file in files for name, value in load_file(file).items()}
    if (checkpoint / AUXILIARY).is_file():
        saved |= {f"{NAME}.{name}": value for name, value in load_file(checkpoint / AUXILIARY).items()}
    if isinstance(model, PeftModel):
        trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
        return {name: saved[name.replace(f".{model.active_adapter}", "")] for name in trained}
    places = dict(model.named_parameters(remove_duplicate=False))
    tied = {id(places[name]): value for name, value in saved.items() if name in places}
    return {**saved, **{name: tied[id(weight)] for name, weight in places.items()}}
