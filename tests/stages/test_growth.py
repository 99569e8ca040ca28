"""Twice the rows take twice the work and hardly more memory, counted instead of timed.

Each step of a run, from the file to stored scores, gets some rows, twice as many and four times as many. The calls of functions
are counted, and the peak of the memory that Python and numpy allocate.
"""

import gc
import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import tokenward.tokens.store as stores
from tests.tiny import tiny_tokenizer
from tokenward.data.prepare import read
from tokenward.data.stream import write_split
from tokenward.scoring.store import TokenStore, write_store
from tokenward.tokens.encode import Limits
from tokenward.tokens.store import ENCODED, EncodedStore, write_encoded
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Template

SIZES = (128, 256, 512)
TEMPLATE = Template(tokenizer=tiny_tokenizer(), kind="plain")
LIMITS = Limits(64, 64, "drop", 64)
WORDS = ["the", "good", "tea", "on", "a", "table", "is", "not", "so", "bad"]


class Cost(NamedTuple):
    """Calls of a step, and the peak of its memory in bytes."""

    calls: int
    peak: int


def cost(step: Callable[[], object]) -> Cost:
    """Run a step and count."""
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    gc.collect()
    tracemalloc.start()
    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return Cost(calls, peak)


def write_rows(path: Path, count: int) -> None:
    """Rows of about the same length; one in eight repeats the row before it."""
    with path.open("w") as file:
        for number in range(count):
            number -= number % 8 == 7
            spoken = [" ".join(WORDS[number % 7 + place :]) for place in range(2)]
            row = {"prompt": f"{number:06d} is", "chosen": spoken[0], "rejected": spoken[1]}
            file.write(json.dumps(row) + "\n")


def zeros(rows, progress):
    """Stands for a model, whose own cost is not of interest here."""
    progress(sum(len(row.responses) for row in rows))
    return {"reference_logp": [[torch.zeros(len(ids)) for ids in row.responses] for row in rows]}


def steps(folder: Path) -> dict[str, Callable[[], object]]:
    """The steps of a run on the rows of a folder, in their order."""
    train, table = folder / "train.jsonl", list[TokenTable]()

    def pairs() -> None:
        store = EncodedStore.open([folder / ENCODED])
        found = TokenTable.pairs(store, "best_worst").fitting(LIMITS)[0]
        table[:] = [found.by_prompt()]

    def score(name: str, **more: object) -> None:
        write_store(folder / name, more.pop("makers"), TEMPLATE, table[0], shard_rows=16, progress=id, **more)

    return {
        "data": lambda: write_split(folder, read(folder / "rows.jsonl").rows, share=0.0, seed=0),
        "encoding": lambda: write_encoded(folder, [train], TEMPLATE, LIMITS, processes=1),
        "pairs": pairs,
        "reference": lambda: score("reference", makers=[zeros]),
        "scores": lambda: score("scores", makers=[], reference=TokenStore(folder / "reference")),
    }


@pytest.fixture(scope="module")
def costs(tmp_path_factory) -> dict[str, list[Cost]]:
    found: dict[str, list[Cost]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stores, "SHARD_ROWS", 64)
        for size in (SIZES[0], *SIZES):  # the first round fills what is computed once
            folder = tmp_path_factory.mktemp(f"rows-{size}")
            write_rows(folder / "rows.jsonl", size)
            for name, step in steps(folder).items():
                found.setdefault(name, []).append(cost(step))
    return {name: taken[1:] for name, taken in found.items()}


STEPS = ("data", "encoding", "pairs", "reference", "scores")


@pytest.mark.parametrize("step", STEPS)
def test_twice_the_rows_are_twice_the_calls(costs, step):
    first, second, third = (taken.calls for taken in costs[step])
    assert third - second == pytest.approx(2 * (second - first), rel=0.02)


@pytest.mark.parametrize(
    ("step", "most"),
    # As Python objects, a row takes more than two kilobytes. Most of what is left here is of shards, which are small here.
    [("data", 400), ("encoding", 600), ("pairs", 300), ("reference", 600), ("scores", 600)],
)
def test_a_row_more_is_a_few_bytes_more(costs, step, most):
    first, _, third = (taken.peak for taken in costs[step])
    assert (third - first) / (SIZES[-1] - SIZES[0]) < most
