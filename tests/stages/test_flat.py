"""The data path is flat: encoded once, built row by row, and memory does not follow the number of pairs."""

import gc
import json
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

import tokenward
from tests.stages.runs import tables_of
from tests.tiny import planted_rows
from tokenward.data.files import read_comparisons
from tokenward.data.pairs import pair_of, pair_places
from tokenward.models.loading import load_tokenizer
from tokenward.scoring.join import with_reference, with_scores
from tokenward.scoring.store import TokenStore
from tokenward.selection import TopFraction
from tokenward.selection import weights as weighing
from tokenward.selection.weights import weigh
from tokenward.stages import scores as score_stages
from tokenward.stages.auxiliary import scorer_of
from tokenward.stages.run import Run
from tokenward.stages.tables import tables
from tokenward.tokens import store as stores
from tokenward.tokens.encode import encode
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.table import TokenTable
from tokenward.tokens.template import Template

RUN = Path("runs/quickstart")


def opened(recipe: Path, *changes: str) -> tuple[Run, TokenTable]:
    """A run and its encoded training pairs."""
    run = tokenward.open_run(recipe, ["data.pairs=all", *changes], quiet=True)
    return run, tables_of(run).train


def eager(run: Run, template: Template | None = None) -> list[TokenRow]:
    """What encoding the same pairs at once gives."""
    rows = list(read_comparisons(run.path("data") / "train.jsonl"))
    found = [pair_of(row, *places) for row in rows for places in pair_places(row, "all")]
    return encode(found, template or run.tokenizer_template(run.start_model), run.limits)[0]


class Invented:
    """Values that depend on the ids only, in the place of two models'."""

    passes = 2

    def __call__(self, group: Sequence[TokenRow], progress) -> dict[str, list[list[torch.Tensor]]]:
        found = [
            [torch.sin(torch.tensor(ids, dtype=torch.float32)) for ids in row.responses] for row in group
        ]
        return {"reference_logp": found, "oracle_logp": found}


def write_store(run: Run, name: str) -> TokenStore:
    """A store of invented values in the folder of a stage."""
    template = run.tokenizer_template(run.start_model)
    rows = tables(run, template).everything
    score_stages._write(run, run.path(name), [Invented()], template, rows)  # type: ignore[list-item]
    return TokenStore(run.path(name))


def same(one: Sequence[TokenRow], other: Sequence[TokenRow]) -> None:
    assert len(one) == len(other) > 0
    for mine, theirs in zip(one, other, strict=True):
        bare = {"weights": None, "reference_logp": None, "scores": None}
        assert replace(mine, **bare) == replace(theirs, **bare)
        for name in bare:
            found, expected = getattr(mine, name), getattr(theirs, name)
            assert (found is None) == (expected is None), name
            assert all(torch.equal(a, b) for a, b in zip(found or (), expected or (), strict=True)), name


def test_rows_with_values_are_those_built_at_once(tiny_workplace: Path) -> None:
    run, table = opened(tiny_workplace)
    rows = with_scores(table, scorer_of(run), write_store(run, "scores"))
    rows = with_reference(rows, write_store(run, "reference"))
    expected = [
        replace(
            row,
            reference_logp=Invented()([row], None)["oracle_logp"][0],
            scores=[torch.zeros(len(ids)) for ids in row.responses],
        )
        for row in eager(run)
    ]
    same(rows, expected)
    order = np.random.default_rng(0).permutation(len(rows))
    same(rows.choose(order), [expected[number] for number in order.tolist()])
    same(rows[3:9][1:4], expected[4:7])
    same(rows[-2:], expected[-2:])


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many comparisons were encoded from now on, call by call."""
    calls: list[int] = []
    plain = stores.encode_parts
    monkeypatch.setattr(
        stores, "encode_parts", lambda rows, *rest: calls.append(len(rows)) or plain(rows, *rest)
    )
    return calls


def test_a_run_encodes_each_comparison_once(tiny_workplace: Path, monkeypatch) -> None:
    calls = counted(monkeypatch)
    short = ["scores.scorer={name: random}", "policy.training.max_steps=1"]
    tokenward.run(tiny_workplace, short, last="policy", quiet=True)
    assert sum(calls) == 24
    calls.clear()
    changes = ["policy.selection={name: all}", "tokens.processes=1"]
    tokenward.run(tiny_workplace, [*short, *changes], last="policy", quiet=True)
    assert calls == []


def test_other_tokens_are_encoded_anew_and_the_first_stay(tiny_workplace: Path, monkeypatch) -> None:
    run, rows = opened(tiny_workplace)
    calls = counted(monkeypatch)
    changes = ("tokens.max_response_tokens=63", "tokens.template=plain", "tokens.too_long=truncate")
    for change in changes:
        opened(tiny_workplace, change)
        assert sum(calls) == len(rows.store)
        calls.clear()
    _, again = opened(tiny_workplace)
    assert calls == []
    assert list(again) == list(rows) == eager(run)


def test_another_tokenizer_is_another_file(tiny_workplace: Path) -> None:
    run, rows = opened(tiny_workplace)
    other, without_end = (run.style.template(load_tokenizer(run.start_model)) for _ in range(2))
    other.tokenizer.chat_template = "You are kind. " + str(other.tokenizer.chat_template)
    found = tables(run, other).train
    assert list(found) == eager(run, other)
    assert found[0].prompt != rows[0].prompt
    without_end.tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"  # no end of a turn: EOS closes
    )
    without_end.tokenizer.eos_token = "a"
    assert list(tables(run, without_end).train) == eager(run, without_end)


def test_other_data_are_encoded_anew(tiny_workplace: Path, monkeypatch) -> None:
    opened(tiny_workplace)
    calls = counted(monkeypatch)
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in planted_rows(24, seed=1)))
    run, rows = opened(tiny_workplace)
    assert sum(calls) == len(rows.store)
    assert list(rows) == eager(run)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        lambda path: pa.ipc.new_file(path, stores.SCHEMA).close(),
    ],
    ids=["gone", "cut off", "of another file"],
)
def test_ids_that_are_not_whole_are_encoded_again(tiny_workplace: Path, damage) -> None:
    _, rows = opened(tiny_workplace)
    before = list(rows)
    del rows
    (path,) = RUN.glob(f"encoded/*/{stores.ENCODED}")
    damage(path)
    assert list(opened(tiny_workplace)[1]) == before
    assert path.is_file()
    assert list((path.parent.parent / ".previous").glob("damaged-encoded-*"))


def test_a_stopped_encoding_goes_on(tiny_workplace: Path, monkeypatch) -> None:
    monkeypatch.setattr(stores, "SHARD_ROWS", 4)
    plain = stores.encode_parts

    def press(rows, *rest):
        if len(list(RUN.glob("encoded/*/rows-*.arrow"))) == 2:
            raise KeyboardInterrupt
        return plain(rows, *rest)

    monkeypatch.setattr(stores, "encode_parts", press)
    with pytest.raises(KeyboardInterrupt):
        opened(tiny_workplace, "tokens.processes=1")
    monkeypatch.setattr(stores, "encode_parts", plain)
    calls = counted(monkeypatch)
    run, rows = opened(tiny_workplace, "tokens.processes=1")
    assert sum(calls) == len(rows.store) - 8
    assert list(rows) == eager(run)


def path_of(run: Run) -> Iterator[str]:
    """The whole data path, step by step; what each makes stays until the next has begun."""
    rows = tables_of(run).train
    yield "data, encoding and pairs"
    store = write_store(run, "reference")
    yield "writing the store"
    stored = with_reference(rows.best_once(), store)
    yield "reading the store"
    weighed = weigh(stored.with_column("scores", stored.columns["reference_logp"]), TopFraction())
    yield "selection"
    for number in torch.randperm(len(weighed)).tolist():
        assert weighed[number].weights is not None
    yield "rows in another order"


def peaks(recipe: Path, count: int) -> dict[str, int]:
    """Bytes at the worst moment of each step, above what was there before all of them."""
    rows = planted_rows(count)
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    del rows
    run = tokenward.open_run(recipe, [f"run=runs/{count}"], quiet=True)
    found = {}
    gc.collect()
    tracemalloc.start()
    for step in path_of(run):
        found[step] = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
    tracemalloc.stop()
    return found


def test_memory_does_not_follow_the_number_of_pairs(tiny_workplace: Path, monkeypatch) -> None:
    # Small portions, so that the smaller of the two sets fills them as well; each shard takes some kilobytes itself.
    monkeypatch.setattr(stores, "SHARD_ROWS", 128)
    monkeypatch.setattr(weighing, "CHUNK_ROWS", 32)
    few, many = (peaks(tiny_workplace, count) for count in (150, 600))
    growth = {step: (many[step] - few[step]) / 450 for step in few}
    assert max(growth.values()) < 600, growth
