"""Bytes of a training step that are held, counted, beside those that the cost model predicts.

    python -m benchmarks.step_bytes

One process counts, for the tiny and the default model, the bytes of weights, gradients and AdamW's moments after a step, and those
of the tensors that the forward pass saves for the backward pass. Two processes, over gloo, count what each holds under FSDP2.
Nothing is timed, so a busy machine changes no number.
"""

import argparse
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import start_processes

from benchmarks.data import random_ids
from benchmarks.folders import tiny
from benchmarks.model import Pair
from tokenward.api.training import with_new_adapter
from tokenward.models.identity import model_sizes
from tokenward.models.loading import LanguageModel, load_model
from tokenward.ops.costs import FLOAT, HALF, NumberTypes, Work, training_memory
from tokenward.ops.sharding import Devices, training_bytes

ADAPTER: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
PAIR, PAIRS = Pair(64, (96, 96)), 2


class Held(NamedTuple):
    """Bytes of a step."""

    weights: float
    gradients: float
    moments: float
    activations: float


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    print("| model | trained | numbers | | weights | gradients | moments | activations |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        small = str(tiny("default", Path(folder) / "tiny", width=64))
        for name, model in (("tiny", small), ("default", "default")):
            for adapter in (None, ADAPTER):
                for half in (False, True):
                    predicted, found = predict(model, adapter, half), count(model, adapter, half)
                    what = (
                        f"| {name} | {'LoRA' if adapter else 'full'} | {'bfloat16' if half else 'float32'} |"
                    )
                    show(what, predicted, found)
        sharded = torch.zeros(3, dtype=torch.int64).share_memory_()
        start_processes(_shard, (small, sharded), nprocs=2, start_method="spawn")
        sizes = model_sizes(small)
        held = training_bytes(sizes, Work(0, 0, 0), NumberTypes(), Devices(2, "fsdp2", 0, 1, 1))
        predicted = Held(held.weights, held.gradients, held.optimizer, 0)
        weights, gradients, moments = map(float, sharded.tolist())
        show(
            "| tiny, each of 2 under FSDP2 | full | float32 |",
            predicted,
            Held(weights, gradients, moments, 0),
        )


def show(what: str, predicted: Held, found: Held) -> None:
    """Print predicted and counted bytes, and their quotient."""
    for name, values in (("predicted", predicted), ("counted", found)):
        print(
            f"{what} {name} | {' | '.join(f'{value / 1e6:,.2f} MB' if value else '' for value in values)} |"
        )
    quotients = [f"{one / other:.3f}" if other else "" for one, other in zip(predicted, found, strict=True)]
    print(f"{what} quotient | {' | '.join(quotients)} |", flush=True)


def predict(name: str, adapter: dict[str, Any] | None, half: bool) -> Held:
    """What the cost model says of the step."""
    tokens = PAIRS * (PAIR.prompt + sum(PAIR.responses))
    work = Work(tokens, PAIRS * sum(PAIR.responses), 0)
    # The copies of the weights that autocast makes belong to the pass: they are counted with what it saves.
    types = NumberTypes(FLOAT, HALF if half else FLOAT)
    found = training_memory(model_sizes(name, adapter=adapter), work, types)
    stored = model_sizes(name, adapter=adapter).weights * FLOAT
    return Held(stored, found.gradients, found.optimizer, found.activations + found.weights - stored)


def count(name: str, adapter: dict[str, Any] | None, half: bool) -> Held:
    """The bytes that a real step holds."""
    model = load_model(name, device="cpu")
    model = with_new_adapter(model, adapter, 0)
    assert isinstance(model, LanguageModel)
    rows = random_ids([PAIR] * PAIRS, vocabulary=256)
    batch = model.collate(rows)
    model.model.train()
    weights = [*model.model.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=half), saved(weights) as bytes_of_saved:
        values, _ = model.read(model.model, batch)
    values.float().sum().neg().backward()
    trained = [weight for weight in weights if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    moments = (value for state in optimizer.state.values() for value in state.values() if value.dim())
    gradients = [weight.grad for weight in trained if weight.grad is not None]
    return Held(size(weights), size(gradients), size(moments), sum(bytes_of_saved.values()))


def size(tensors: Iterable[Tensor]) -> float:
    """Bytes of some tensors."""
    return float(sum(item.numel() * item.element_size() for item in tensors))


@contextmanager
def saved(weights: list[nn.Parameter]) -> Iterator[dict[int, int]]:
    """Bytes of what is saved for the backward pass, by address, without the weights."""
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    found: dict[int, int] = {}
    kept: list[Tensor] = []  # so that no address is used twice

    def note(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            found[place] = tensor.untyped_storage().nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield found


def _shard(rank: int, name: str, result: Tensor) -> None:
    """One of two processes that train under FSDP2."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{_PORT}", rank=rank, world_size=2)
    model = load_model(name, device="cpu").model
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.train()
    model(input_ids=torch.arange(32)[None]).logits.logsumexp(-1).sum().backward()
    weights = [*model.parameters()]
    optimizer = torch.optim.AdamW(weights)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    parts = (weights, [weight.grad for weight in weights], moments)
    if rank == 0:
        result.copy_(
            torch.tensor(
                [int(size(item.to_local() for item in part if isinstance(item, DTensor))) for part in parts]
            )
        )
    dist.destroy_process_group()


_PORT = 29617


if __name__ == "__main__":
    main()
