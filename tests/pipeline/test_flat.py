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
from tokenward.pipeline import values
from tokenward.pipeline.rows import LazyRows, responses_of
from tokenward.pipeline.scored import scored_rows
from tokenward.pipeline.values import weigh_all, weigh_rows, with_reference
from tokenward.tokens.encoded import EncodedRows

import tokenward
from tests.tiny import planted_rows
from tokenward.errors import UserError
from tokenward.selection import SideRule, SoftWeights, TopFraction, Transform
from tokenward.stages import scores as score_stages
from tokenward.stages.data import encode_set, pair_sets
from tokenward.stages.run import Run
from tokenward.stages.training import best_once
from tokenward.tokens import shards
from tokenward.tokens.encode import encode
from tokenward.tokens.rows import TokenRow
from tokenward.tokens.segments import with_segments
from tokenward.types import Comparison

RUN = Path("runs/quickstart")


def opened(recipe: Path, *changes: str) -> tuple[Run, EncodedRows]:
    """A run whose scores are there, and its encoded training pairs."""
    run = tokenward.open_run(recipe, ["data.pairs=all", *changes], quiet=True)
    tokenward.prepare_data(run)
    rows = encode_set(run, pair_sets(run).train, run.tokenizer_template(run.start_model)).rows
    assert isinstance(rows, EncodedRows)
    return run, rows


def eager(run: Run) -> list[TokenRow]:
    """What encoding the same pairs at once gives."""
    pairs: list[Comparison] = list(pair_sets(run).train)
    return list(encode(pairs, run.tokenizer_template(run.start_model), run.limits).rows)


class Invented:
    """Values that depend on the ids only, in the place of two models'."""

    passes = 2

    def __call__(self, group: Sequence[TokenRow], progress) -> dict[str, list[list[torch.Tensor]]]:
        found = [
            [torch.sin(torch.tensor(ids, dtype=torch.float32)) for ids in row.responses] for row in group
        ]
        return {"reference_logp": found, "oracle_logp": found}


def write_store(run: Run, name: str) -> None:
    """A store of invented values in the folder of a stage."""
    template = run.tokenizer_template(run.start_model)
    rows, _ = score_stages.all_rows(run, template)
    score_stages._write(run, run.path(name), [Invented()], template, rows)  # type: ignore[list-item]


def same(one: Sequence[TokenRow], other: Sequence[TokenRow]) -> None:
    assert len(one) == len(other) > 0
    for mine, theirs in zip(one, other, strict=True):
        assert mine == theirs.encoded
        for name in ("weights", "reference_logp", "scores"):
            found, expected = getattr(mine, name), getattr(theirs, name)
            assert (found is None) == (expected is None), name
            assert all(torch.equal(a, b) for a, b in zip(found or (), expected or (), strict=True)), name


def test_rows_with_values_are_those_built_at_once(tiny_workplace: Path) -> None:
    run, lazy = opened(tiny_workplace)
    for name in ("reference", "scores"):
        write_store(run, name)
    rows = with_reference(run, scored_rows(run, LazyRows(encoded=lazy)))
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


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize(
    "selector",
    [
        TopFraction(),
        TopFraction(chosen=SideRule(fraction=0.2), eos="none", scope="comparison"),
        TopFraction(chosen=SideRule(fraction=0.01), scope="dataset"),
        TopFraction(chosen=SideRule(direction="random"), ties="random"),
        SoftWeights(transform="exp", spread="sequence"),
        Transform(steps=({"threshold": {"at": "mean", "scope": "dataset"}},)),
        Transform(steps=({"rank_scale": {"scope": "comparison"}},)),
    ],
    ids=str,
)
def test_weights_do_not_depend_on_how_many_rows_are_weighed_at_once(
    tiny_workplace: Path, monkeypatch, selector, chunk: int
) -> None:
    monkeypatch.setattr(values, "CHUNK_ROWS", chunk)
    run, lazy = opened(tiny_workplace)
    write_store(run, "reference")
    stored = with_reference(run, LazyRows(encoded=lazy))
    rows = stored.with_column("scores", stored.columns["reference_logp"])
    same(weigh_all(run, selector, rows), weigh_rows(selector, list(rows)))


@pytest.mark.parametrize("chunk", [1, 1000])
def test_words_are_known_to_a_selector_that_names_them(tiny_workplace: Path, monkeypatch, chunk: int) -> None:
    monkeypatch.setattr(values, "CHUNK_ROWS", chunk)
    run, lazy = opened(tiny_workplace)
    write_store(run, "reference")
    stored = with_reference(run, LazyRows(encoded=lazy))
    rows = stored.with_column("scores", stored.columns["reference_logp"])
    tokenizer = run.tokenizer_template(run.start_model).tokenizer
    pool = Transform(steps=({"segment_pool": {"segment": "word", "how": "max"}},), signed=True)
    row = weigh_all(run, pool, rows, tokenizer)[3]
    for side, ids in enumerate(row.responses):
        words = with_segments("word", tokenizer, row).segments[side]
        scores = torch.sin(torch.tensor(ids, dtype=torch.float32))
        expected = [float(scores[words == word].max()) for word in words.tolist()]
        assert row.weights[side].tolist() == pytest.approx(expected)
        assert 1 < len(words.unique()) < len(ids)


def test_what_is_known_of_responses_is_the_same_from_the_file(tiny_workplace: Path) -> None:
    run, lazy = opened(tiny_workplace)
    for found, expected in zip(responses_of(lazy), responses_of(eager(run)), strict=True):
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("order", [1, -1], ids=["best pairs first", "worst pairs first"])
def test_the_best_of_each_prompt_is_the_same_as_by_ids(tiny_workplace: Path, order: int) -> None:
    run, lazy = opened(tiny_workplace)
    rows = [row for row in eager(run)][::order]
    losers = {(tuple(row.prompt), tuple(row.responses[1])) for row in rows}
    best: dict[tuple[int, ...], TokenRow] = {}
    for row in rows:
        if (tuple(row.prompt), tuple(row.responses[0])) not in losers:
            best.setdefault(tuple(row.prompt), row)
    ordered = LazyRows(encoded=lazy).choose(np.arange(len(lazy))[::order])
    same(best_once(ordered), list(best.values()))
    same(best_once(rows), list(best.values()))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many comparisons were encoded from now on, call by call."""
    calls: list[int] = []
    plain = shards.encode_parts
    monkeypatch.setattr(
        shards, "encode_parts", lambda rows, *rest: calls.append(len(rows)) or plain(rows, *rest)
    )
    return calls


def test_a_run_encodes_each_comparison_once(tiny_workplace: Path, monkeypatch) -> None:
    calls = counted(monkeypatch)
    tokenward.run(tiny_workplace, quiet=True)
    assert sum(calls) == 24
    calls.clear()
    tokenward.run(tiny_workplace, ["policy.selection={name: all}", "tokens.processes=1"], quiet=True)
    assert calls == []


@pytest.mark.parametrize(
    "change", ["tokens.max_response_tokens=63", "tokens.template=plain", "tokens.too_long=truncate"]
)
def test_other_tokens_are_encoded_anew_and_the_first_stay(
    tiny_workplace: Path, monkeypatch, change: str
) -> None:
    run, rows = opened(tiny_workplace)
    calls = counted(monkeypatch)
    opened(tiny_workplace, change)
    assert sum(calls) == len(rows.comparisons.file)
    calls.clear()
    _, again = opened(tiny_workplace)
    assert calls == []
    assert list(again) == list(rows) == eager(run)


def test_another_tokenizer_is_another_file(tiny_workplace: Path) -> None:
    run, rows = opened(tiny_workplace)
    pairs = pair_sets(run).train
    other = run.tokenizer_template(run.start_model)
    other.tokenizer.chat_template = "You are kind. " + str(other.tokenizer.chat_template)
    found = encode_set(run, pairs, other).rows
    assert list(found) == list(encode(list(pairs), other, run.limits).rows)
    assert found[0].prompt != rows[0].prompt
    closed_otherwise = run.tokenizer_template(run.start_model)
    closed_otherwise.tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"  # no end of a turn: EOS closes
    )
    closed_otherwise.tokenizer.eos_token = "a"
    found = encode_set(run, pairs, closed_otherwise).rows
    assert list(found) == list(encode(list(pairs), closed_otherwise, run.limits).rows)


def test_other_data_are_encoded_anew(tiny_workplace: Path, monkeypatch) -> None:
    opened(tiny_workplace)
    calls = counted(monkeypatch)
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in planted_rows(24, seed=1)))
    run, rows = opened(tiny_workplace)
    assert sum(calls) == len(rows.comparisons.file)
    assert list(rows) == eager(run)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        lambda path: pa.ipc.new_file(path, shards.SCHEMA).close(),
    ],
    ids=["gone", "cut off", "of another file"],
)
def test_ids_that_are_not_whole_are_refused(tiny_workplace: Path, damage) -> None:
    opened(tiny_workplace)
    (path,) = RUN.glob(f"encoded/*/{shards.ENCODED}")
    damage(path)
    with pytest.raises(UserError, match=r"is not the \d+ encoded comparisons .* Delete the folder"):
        opened(tiny_workplace)


def test_a_stopped_encoding_is_gone_on_with(tiny_workplace: Path, monkeypatch) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", 4)
    plain = shards.encode_parts

    def press(rows, *rest):
        if len(list(RUN.glob("encoded/*/rows-*.arrow"))) == 2:
            raise KeyboardInterrupt
        return plain(rows, *rest)

    monkeypatch.setattr(shards, "encode_parts", press)
    with pytest.raises(KeyboardInterrupt):
        opened(tiny_workplace, "tokens.processes=1")
    monkeypatch.setattr(shards, "encode_parts", plain)
    calls = counted(monkeypatch)
    run, rows = opened(tiny_workplace, "tokens.processes=1")
    assert sum(calls) == len(rows.comparisons.file) - 8
    assert list(rows) == eager(run)


def path_of(run: Run) -> Iterator[str]:
    """The whole data path, step by step; what each makes stays until the next has begun."""
    tokenward.prepare_data(run)
    yield "data"
    template = run.tokenizer_template(run.start_model)
    rows = encode_set(run, pair_sets(run).train, template).rows
    yield "encoding"
    write_store(run, "reference")
    yield "writing the store"
    stored = with_reference(run, best_once(LazyRows(encoded=rows)))
    yield "reading the store"
    weighed = weigh_all(run, TopFraction(), stored.with_column("scores", stored.columns["reference_logp"]))
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
    # Small portions, so that the smaller of the two sets fills them as well.
    monkeypatch.setattr(shards, "SHARD_ROWS", 32)
    monkeypatch.setattr(values, "CHUNK_ROWS", 32)
    few = peaks(tiny_workplace, 150)
    # The second time for what the interpreter grows in leaps, such as its table of strings.
    growth = [
        max((many[step] - few[step]) / (count - 150) for step in few)
        for count in (900, 901)
        for many in [peaks(tiny_workplace, count)]
    ]
    assert min(growth) < 600, growth
