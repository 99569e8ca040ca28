"""Ids on disk: the same as ids in memory, the same bytes after any stop and with any number of processes."""

import itertools
import json
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tokenward.tokens.encoded import EncodedRows, Joined
from tokenward.tokens.shards import ENCODED, EncodedFile, write_encoded

from tests.tiny import tiny_tokenizer
from tokenward.data.choice import Choice
from tokenward.data.lines import ComparisonFile, to_line
from tokenward.data.pairs import pair_places
from tokenward.errors import UserError
from tokenward.tokens import shards
from tokenward.tokens.encode import Limits, encode, encode_one
from tokenward.tokens.rows import TokenRow, keys_of
from tokenward.tokens.template import Template
from tokenward.types import Comparison

TEMPLATE = Template(tokenizer=tiny_tokenizer())
PLAIN = Template(tokenizer=tiny_tokenizer(), kind="plain")
LIMITS = Limits(64, 8, "truncate")


def comparisons(count: int = 11) -> list[Comparison]:
    """Prompts that repeat, responses that share a beginning, some too long."""
    texts = ["good", "goods", "t" * 9 + "x", "t" * 9 + "y", "the a", "", "tea " * 3]
    return [
        Comparison(
            key=f"{7919 * number:016x}",
            prompt=(
                {"role": "user", "content": "old " * (5 * (number % 4))},
                {"role": "assistant", "content": "yes"},
                {"role": "user", "content": f"q{number % 3} t"},
            ),
            responses=tuple(dict.fromkeys([texts[number % 7], texts[(number + 1) % 7], "no", "he"]))[
                : 2 + number % 3
            ],
            ranks=tuple(range(2 + number % 3)),
            source=f"f:{number}",
        )
        for number in range(count)
    ]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ComparisonFile:
    monkeypatch.setattr(shards, "SHARD_ROWS", 4)
    monkeypatch.setattr(shards, "_TOKENIZED_AT_ONCE", 3)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(map(to_line, comparisons())))
    return ComparisonFile(path)


def pairs_of(file: ComparisonFile) -> Choice:
    places = [pair_places(row, "all") for row in file]
    rows = [number for number, found in enumerate(places) for _ in found]
    return Choice.pairs(file, rows, [place for found in places for pair in found for place in pair])


def lazily(
    file: ComparisonFile, template: Template, limits: Limits, folder: Path, chosen: Choice | None = None
) -> EncodedRows:
    folder.mkdir(exist_ok=True)
    write_encoded(folder, file, template, limits)
    chosen = pairs_of(file) if chosen is None else chosen
    ids = EncodedFile(folder / ENCODED)
    return EncodedRows(comparisons=chosen, ids=ids, limits=limits)


@pytest.mark.parametrize("template", [TEMPLATE, PLAIN], ids=["chat", "plain"])
@pytest.mark.parametrize(
    "limits",
    [
        Limits(64, 8), Limits(200, 40), LIMITS, Limits(40, 5, "truncate"), Limits(200, 8, "truncate", 90),
        Limits(64, 8, "drop", 60),
    ],
    ids=str,
)  # fmt: skip
def test_rows_from_the_file_are_those_encoded_at_once(tmp_path, file, template, limits):
    whole = Choice.whole(file, range(len(file)), [len(row.responses) for row in file])
    for number, chosen in enumerate((pairs_of(file), whole)):
        expected = encode(chosen, template, limits, may_be_empty=True)
        rows, counts = lazily(file, template, limits, tmp_path / str(number), chosen).judged()
        assert list(rows) == list(expected.rows)
        assert {**counts, "kept": len(rows)} == expected.counts
        assert rows.lengths.tolist() == [len(ids) for row in expected.rows for ids in row.responses]
        assert rows.closed.tolist() == [closed for row in expected.rows for closed in row.closed]


def test_the_examples_above_reach_every_reason(file):
    found = set()
    for limits in (Limits(64, 8), Limits(40, 5, "truncate"), Limits(200, 8, "truncate", 90)):
        found |= set(encode(pairs_of(file), TEMPLATE, limits, may_be_empty=True).counts)
    assert found >= {
        "dropped: prompt too long", "dropped: response too long", "note: prompt truncated", "note: response truncated",
        "dropped: responses are the same after truncation", "dropped: longer than the model's context",
    }  # fmt: skip


def test_a_row_that_is_too_long_stops_where_that_is_wished(tmp_path, file):
    with pytest.raises(UserError, match=r"f:\d+: the prompt has .*allowed are 64 and 8"):
        lazily(file, TEMPLATE, Limits(64, 8, "error"), tmp_path / "ids").judged()


def test_shards_take_many_rows_to_the_tokenizer_at_once_with_the_same_ids(file):
    rows = list(file)
    for row, parts in zip(rows, shards.encode_parts(rows, TEMPLATE, LIMITS), strict=True):
        alone, _ = encode_one(row, TEMPLATE, LIMITS)
        if alone is not None:
            assert parts.encoded(row, LIMITS) == alone


def grouped(rows: Sequence[TokenRow]) -> list[tuple[str, list[str]]]:
    """Prompts in their order, with the distinct responses of each in theirs."""
    groups: dict[str, dict[str, None]] = {}
    for row in rows:
        groups.setdefault(json.dumps(row.comparison.prompt), {}).update(
            dict.fromkeys(row.comparison.responses)
        )
    return [(prompt, list(texts)) for prompt, texts in groups.items()]


def test_a_prompt_is_one_row_with_each_response_once(tmp_path, file):
    rows, _ = lazily(file, TEMPLATE, LIMITS, tmp_path / "ids").judged()
    # A mixed order, in which prompts and responses come back later.
    rows = rows.choose(np.random.default_rng(0).permutation(len(rows)))
    found = rows.by_prompt()
    assert [(json.dumps(row.comparison.prompt), list(row.comparison.responses)) for row in found] == grouped(
        rows
    )
    for row in found:
        assert row == encode_one(row.comparison, TEMPLATE, LIMITS)[0]
    joined = Joined([found[:2], found[:0], found[2:]])
    assert list(joined) == list(found)
    assert joined[-1] == found[-1]
    with pytest.raises(IndexError):
        joined[len(found)]


def test_rows_from_the_file_have_their_context_and_group_by_their_trunk(tmp_path):
    """Of one prompt some replies think and some do not, so their rows begin with more or less of what is asked with."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}<{{ m.reasoning_content or '' }}>{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:<I{% endif %}"
    )
    template = Template(tokenizer=tokenizer)

    def said(content: str, **more: str):
        return {"role": "assistant", "content": content, **more}

    several = (said("a", reasoning_content="I go"), {"role": "user", "content": "on"}, said("b"))
    rows = [((said("x", reasoning_content="I do"),), several), (None, several), (None, None)]
    known = [
        Comparison(
            key=f"{number:016x}",
            prompt=({"role": "user", "content": "q"},),
            responses=(f"x{number}", f"y{number}"),
            ranks=(0, 1),
            source=f"f:{number}",
            turns=turns if any(turns) else None,
        )
        for number, turns in enumerate(rows)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(map(to_line, known)))
    file, limits = ComparisonFile(path), Limits(200, 200)
    pairs = Choice.pairs(file, [0, 1, 2], [0, 1] * 3)
    found, _ = lazily(file, template, limits, tmp_path / "ids", pairs).judged()
    expected = encode(list(pairs), template, limits).rows
    assert list(found) == list(expected)
    assert len(found[0].inserts(1)) > 1 or len(found[1].inserts(1)) > 1
    assert len({tuple(row.prompt) for row in found}) == 2
    assert all(row.asked == template.prompt_ids(row.comparison.prompt) for row in found)
    whole = {
        key: [*row.prompt, *row.whole(place)[0]]
        for row in expected
        for place, key in enumerate(keys_of(row.comparison))
    }
    for row in found.by_prompt():
        for place, key in enumerate(keys_of(row.comparison)):
            assert [*row.prompt, *row.whole(place)[0]] == whole[key]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.skipif(
    sys.platform != "linux", reason="the small shards of this test reach forked processes only"
)
def test_the_number_of_processes_changes_no_byte(tmp_path, file):
    found = []
    for processes in (1, 2, 3):
        folder = tmp_path / str(processes)
        folder.mkdir()
        done: list[int] = []
        write_encoded(folder, file, TEMPLATE, LIMITS, processes=processes, progress=done.append)
        assert sorted(done) == [3, 4, 4]
        found.append(contents(folder))
    assert list(found[0]) == [ENCODED]
    assert found[0] == found[1] == found[2]


@pytest.mark.skipif(sys.platform != "linux", reason="as above")
@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_in_any_process_is_the_users(tmp_path, file, monkeypatch, processes):
    def refuse(*given):
        raise UserError("refused")

    monkeypatch.setattr(shards, "encode_parts", refuse)
    with pytest.raises(UserError, match="refused"):
        write_encoded(tmp_path, file, TEMPLATE, LIMITS, processes=processes)


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_a_stopped_encoding_goes_on_and_ends_with_the_same_bytes(tmp_path, file, monkeypatch, stop):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir(), stopped.mkdir()
    plain, calls = shards.encode_parts, itertools.count(1)

    def press(*given):
        if next(calls) == stop:
            raise KeyboardInterrupt
        return plain(*given)

    monkeypatch.setattr(shards, "encode_parts", press)
    with pytest.raises(KeyboardInterrupt):
        write_encoded(stopped, file, TEMPLATE, LIMITS)
    done = sorted(contents(stopped))
    assert done == [f"rows-{number:05d}.arrow" for number in range((stop - 1) // 2)], (
        "whole shards, and no others"
    )
    again: list[int] = []
    monkeypatch.setattr(
        shards, "encode_parts", lambda rows, *rest: again.append(len(rows)) or plain(rows, *rest)
    )
    write_encoded(stopped, file, TEMPLATE, LIMITS)
    assert sum(again) == len(file) - 4 * len(done)
    write_encoded(whole, file, TEMPLATE, LIMITS)
    assert contents(stopped) == contents(whole)


def test_little_data_is_encoded_in_this_process(tmp_path, file, monkeypatch):
    monkeypatch.setattr(shards, "_SHARDS_WORTH_A_PROCESS", 2)
    monkeypatch.setattr(shards, "ProcessPoolExecutor", None)
    write_encoded(tmp_path, file, TEMPLATE, LIMITS)
    assert len(EncodedFile(tmp_path / ENCODED)) == len(file)


def test_rows_travel_to_another_process_by_name(tmp_path, file):
    rows = lazily(file, TEMPLATE, LIMITS, tmp_path / "ids")
    content = pickle.dumps(rows)
    assert list(pickle.loads(content)) == list(rows)


def test_no_rows_at_all(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    file = ComparisonFile(tmp_path / "rows.jsonl")
    rows, counts = lazily(file, TEMPLATE, LIMITS, tmp_path / "ids").judged()
    assert list(rows) == list(rows.by_prompt()) == []
    assert counts == {"read": 0}
