"""Rows and models that the training tests share."""

import gc
import os
import random
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.tiny import tiny_llama, tiny_tokenizer
from tokenward.models.head import install_head
from tokenward.models.loading import LanguageModel
from tokenward.scoring.reads import token_values
from tokenward.tokens.rows import Layout, TokenRow
from tokenward.training.arguments import TokenTrainingArguments, training_arguments
from tokenward.types import Comparison

CLOSING = tiny_tokenizer().eos_token_id
ROOT = Path(__file__).parents[2]


def language_model(model=None, *, layout: Layout = "shared") -> LanguageModel:
    """A model as ``load_model`` gives it, without its folder and its probe."""
    model = (tiny_llama() if model is None else model).eval()
    return LanguageModel(
        model=model,
        tokenizer=tiny_tokenizer(),
        head=install_head(model),
        layout=layout,
        fingerprint="",
        name="tiny",
    )


def token_row(
    prompt: Sequence[int], responses: Sequence[Sequence[int]], source: str, ranks: Sequence[int] = (0, 1)
) -> TokenRow:
    """A comparison of given ids; every response ends with the end-of-turn token."""
    comparison = Comparison(key=source, prompt=(), responses=tuple("ab"), ranks=tuple(ranks), source=source)
    ids = [[*response, CLOSING] for response in responses]
    return TokenRow(comparison, list(prompt), ids, [1] * len(ids))


def random_rows(count: int, *, longest: int = 12, seed: int = 0) -> list[TokenRow]:
    """Pairs of random ids, from 1 to ``longest`` tokens a response."""
    rng = random.Random(seed)

    def ids(most: int) -> list[int]:
        return [rng.randrange(256) for _ in range(rng.randint(1, most))]

    return [token_row(ids(longest), (ids(longest), ids(longest)), f"rows:{i + 1}") for i in range(count)]


def with_reference(model: LanguageModel, rows: Sequence[TokenRow]) -> list[TokenRow]:
    """The same rows with the log-probabilities of a model as their reference."""
    values = token_values(model, rows, precision="float32", tokens_per_batch=4096)
    return [replace(row, reference_logp=value) for row, value in zip(rows, values, strict=True)]


def arguments(folder: Path, **settings: Any) -> TokenTrainingArguments:
    """Plain gradient descent on the CPU, a log at every step.

    Not Adam: it divides the gradient by its own size, so a wrong denominator would not show.
    """
    table = {
        "use_cpu": True,
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        **settings,
    }
    return training_arguments(table, folder=folder, seed=7, where="policy.training")


def weights_of(model) -> dict[str, torch.Tensor]:
    """A copy of a model's weights."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Of any weight between two models."""
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def in_two_processes(command: Sequence[str], folder: Path) -> None:
    """Carry out a command as each of two processes of one training; where one fails the other is ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [start_process(command, folder / f"rank{rank}.txt", rank, port) for rank in range(2)]
    try:
        # A busy machine is no failure, so the limit is one that only processes that wait for each other reach. One that has failed
        # leaves the other waiting for it.
        until = time.monotonic() + STUCK
        while any(worker.poll() is None for worker in workers) and not any(w.poll() for w in workers):
            assert time.monotonic() < until, "the processes wait for each other"
            time.sleep(0.05)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    said = "\n".join((folder / f"rank{rank}.txt").read_text()[-3000:] for rank in range(2))
    assert [worker.returncode for worker in workers] == [0, 0], said


STUCK = 1200.0
"""Seconds after which two processes are taken for stuck."""


def start_process(command: Sequence[str], log: Path, rank: int, port: int) -> subprocess.Popen:
    """One of two processes, told of the other as torchrun tells it."""
    placed = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    environment = {
        **os.environ,
        **{name: str(value) for name, value in placed.items()},
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT))),
    }
    with log.open("w") as out:
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)


@contextmanager
def cheap_collection() -> Iterator[None]:
    """While open, garbage is looked for among new objects: each training collects it, which took most of the time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
