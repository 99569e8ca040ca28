"""The table of encoded comparisons: on disk as in memory, whatever stops it and however many processes write it."""

import itertools
import json
import pickle
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import tiny_tokenizer
from tokenward.data.files import to_line
from tokenward.data.pairs import pair_of, pair_places
from tokenward.errors import UserError
from tokenward.tokens import store as stores
from tokenward.tokens.encode import Limits, encode, encode_one
from tokenward.tokens.rows import TokenRow, keys_of
from tokenward.tokens.store import ENCODED, EncodedStore, write_encoded
from tokenward.tokens.table import TokenTable
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
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(stores, "SHARD_ROWS", 4)
    monkeypatch.setattr(stores, "_TOKENIZED_AT_ONCE", 3)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(map(to_line, comparisons())))
    return path


def stored(file: Path, limits: Limits, folder: Path, template: Template = TEMPLATE) -> EncodedStore:
    folder.mkdir(exist_ok=True)
    write_encoded(folder, [file], template, limits)
    return EncodedStore.open([folder / ENCODED])


def pairs_of_one(row, rule):
    return [pair_of(row, *places) for places in pair_places(row, rule)]


RULES = ("all", "best_worst", "adjacent")
SEVERAL = (
    Limits(64, 8), Limits(200, 40), LIMITS, Limits(40, 5, "truncate"), Limits(200, 8, "truncate", 90), Limits(64, 8, "drop", 60),
)  # fmt: skip


@pytest.mark.parametrize("template", [TEMPLATE, PLAIN], ids=["chat", "plain"])
def test_rows_are_those_of_encoding_each_comparison(tmp_path, file, template):
    for number, limits in enumerate(SEVERAL):
        on_disk = stored(file, limits, tmp_path / f"{number}", template)
        in_memory = EncodedStore.made(comparisons(), template, limits)
        for rule in RULES:
            expected, counts = encode(
                [pair for row in comparisons() for pair in pairs_of_one(row, rule)],
                template,
                limits,
                may_be_empty=True,
            )
            for store in (on_disk, in_memory):
                rows, counted = TokenTable.pairs(store, rule).fitting(limits)
                assert list(rows) == expected
                assert dict(counted) == {**counts, "kept": len(expected)}
                assert rows.lengths.tolist() == [len(ids) for row in expected for ids in row.responses]
                assert rows.eos.tolist() == [count for row in expected for count in row.eos]
                assert rows.ranks.tolist() == [rank for row in expected for rank in row.comparison.ranks]
                keys = [f"{key:016x}" for key in rows.keys.tolist()]
                assert keys == [key for row in expected for key in keys_of(row.comparison)]
        whole, _ = TokenTable.whole(on_disk).fitting(limits)
        assert list(whole) == encode(comparisons(), template, limits, may_be_empty=True)[0]


def test_what_is_dropped_or_changed_is_counted():
    found: set[str] = set()
    for limits in SEVERAL:
        store = EncodedStore.made(comparisons(), TEMPLATE, limits)
        found |= set(TokenTable.pairs(store, "all").fitting(limits)[1])
    assert found >= {
        "dropped: prompt too long", "dropped: response too long", "note: prompt truncated to max_prompt_tokens", "note: response truncated to max_response_tokens",
        "dropped: responses have the same tokens after truncation", "dropped: longer than the model's context",
    }  # fmt: skip


def test_a_row_that_is_too_long_stops_if_that_is_wished():
    limits = Limits(64, 8, "error")
    with pytest.raises(UserError, match=r"f:\d+: the prompt has ") as error:
        TokenTable.pairs(EncodedStore.made(comparisons(), TEMPLATE, limits), "all").fitting(limits)
    assert error.value.code == "too-long"


def table(rule: str = "all") -> TokenTable:
    return TokenTable.pairs(EncodedStore.made(comparisons(), TEMPLATE, LIMITS), rule).fitting(LIMITS)[0]


def test_rows_are_chosen_joined_exchanged_and_taken_apart():
    rows = table()
    assert list(rows[2:5]) == list(rows)[2:5]
    assert rows[-1] == list(rows)[-1]
    mixed = np.random.default_rng(0).permutation(len(rows))
    assert list(rows.choose(mixed)) == [rows[number] for number in mixed]
    assert list(rows[:3].then(rows[5:])) == [*rows[:3], *rows[5:]]
    for row, other in zip(rows, rows.swapped(), strict=True):
        assert other.responses == row.responses[::-1]
        assert other.comparison.responses == row.comparison.responses[::-1]
        assert other.comparison.ranks == (0, 1)
    assert [row.responses for row in rows.of_place(1)] == [[row.responses[1]] for row in rows]
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_a_comparison_of_one_response_is_a_row_and_keeps_its_rank():
    alone = [
        replace(row, responses=row.responses[:1], ranks=(rank,)) for rank, row in enumerate(comparisons(2))
    ]
    store = EncodedStore.made([*alone, *comparisons(3)[2:]], TEMPLATE, LIMITS)
    rows = TokenTable.pairs(store, "best_worst")
    assert rows.sizes.tolist() == [1, 1, 2]
    assert rows.ranks.tolist() == [0, 1, 0, 1]
    assert [row.comparison for row in rows[:2]] == alone


def test_each_prompt_has_its_best_response_once():
    rows = table()
    losers = {(tuple(row.prompt), tuple(row.responses[1])) for row in rows}
    best: dict[tuple[int, ...], TokenRow] = {}
    for row in rows:
        if (tuple(row.prompt), tuple(row.responses[0])) not in losers:
            best.setdefault(tuple(row.prompt), row)
    assert list(rows.best_once()) == list(best.values())


def test_values_are_columns_of_their_responses(tmp_path):
    rows = replace(table(), scratch=tmp_path)
    values = torch.arange(int(rows.lengths.sum()), dtype=torch.float32)
    scored = rows.with_column("scores", rows.own_column(values.split(7)))
    scored = scored.with_column("oracle_logp", rows.own_column([values + 0.5]))
    assert list(tmp_path.iterdir()) == []  # a scratch file has no name
    flat = [score for row in scored for score in row.scores or ()]
    assert torch.equal(torch.cat(flat), values)
    assert torch.equal(scored[3].values["oracle_logp"][1], scored[3].scores[1] + 0.5)
    some = scored.choose(np.array([4, 0]))
    assert torch.equal(some[0].scores[1], scored[4].scores[1])
    scored[0].scores[0].fill_(-1)  # a row's owner may change its copy
    assert torch.equal(scored[0].scores[0], values[: len(scored[0].responses[0])])


def grouped(rows: Sequence[TokenRow]) -> list[tuple[str, list[str]]]:
    """Prompts in their order, with the distinct responses of each in theirs."""
    groups: dict[str, dict[str, None]] = {}
    for row in rows:
        groups.setdefault(json.dumps(row.comparison.prompt), {}).update(
            dict.fromkeys(row.comparison.responses)
        )
    return [(prompt, list(texts)) for prompt, texts in groups.items()]


def test_a_prompt_is_one_row_with_each_response_once():
    rows = table()
    # A mixed order, in which prompts and responses come back later.
    rows = rows.choose(np.random.default_rng(0).permutation(len(rows)))
    found = rows.by_prompt()
    assert [(json.dumps(row.comparison.prompt), list(row.comparison.responses)) for row in found] == grouped(
        rows
    )
    for row in found:
        assert row == encode_one(row.comparison, TEMPLATE, LIMITS)[0]


def test_rows_have_their_context_and_group_by_their_trunk():
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
    limits = Limits(200, 200)
    found = TokenTable.pairs(EncodedStore.made(known, template, limits), "all")
    expected, _ = encode([pair for row in known for pair in pairs_of_one(row, "all")], template, limits)
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
        write_encoded(folder, [file], TEMPLATE, LIMITS, processes=processes, progress=done.append)
        assert sorted(done) == [3, 4, 4]
        found.append(contents(folder))
    assert list(found[0]) == [ENCODED]
    assert found[0] == found[1] == found[2]


@pytest.mark.skipif(sys.platform != "linux", reason="as above")
@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_in_any_process_is_the_users(tmp_path, file, monkeypatch, processes):
    def refuse(*given):
        raise UserError("refused")

    monkeypatch.setattr(stores, "encode_parts", refuse)
    with pytest.raises(UserError, match="refused"):
        write_encoded(tmp_path / "ids", [file], TEMPLATE, LIMITS, processes=processes)


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_a_stopped_encoding_goes_on_and_ends_with_the_same_bytes(tmp_path, file, monkeypatch, stop):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir(), stopped.mkdir()
    plain, calls = stores.encode_parts, itertools.count(1)

    def press(*given):
        if next(calls) == stop:
            raise KeyboardInterrupt
        return plain(*given)

    monkeypatch.setattr(stores, "encode_parts", press)
    with pytest.raises(KeyboardInterrupt):
        write_encoded(stopped, [file], TEMPLATE, LIMITS)
    done = sorted(contents(stopped))
    assert done == [f"rows-{number:05d}.arrow" for number in range((stop - 1) // 2)], (
        "whole shards, and no others"
    )
    again: list[int] = []
    monkeypatch.setattr(
        stores, "encode_parts", lambda rows, *rest: again.append(len(rows)) or plain(rows, *rest)
    )
    write_encoded(stopped, [file], TEMPLATE, LIMITS)
    assert sum(again) == len(comparisons()) - 4 * len(done)
    write_encoded(whole, [file], TEMPLATE, LIMITS)
    assert contents(stopped) == contents(whole)


def test_little_data_is_encoded_in_this_process(tmp_path, file, monkeypatch):
    monkeypatch.setattr(stores, "_SHARDS_WORTH_A_PROCESS", 2)
    monkeypatch.setattr(stores, "ProcessPoolExecutor", None)
    (tmp_path / "ids").mkdir()
    write_encoded(tmp_path / "ids", [file], TEMPLATE, LIMITS)
    assert len(EncodedStore.open([tmp_path / "ids" / ENCODED])) == len(comparisons())


def test_rows_travel_to_another_process(tmp_path, file):
    for store in (stored(file, LIMITS, tmp_path / "ids"), EncodedStore.made(comparisons(), TEMPLATE, LIMITS)):
        rows = TokenTable.pairs(store, "all")
        assert list(pickle.loads(pickle.dumps(rows))) == list(rows)


def test_no_rows_at_all(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    store = stored(tmp_path / "rows.jsonl", LIMITS, tmp_path / "ids")
    rows, counts = TokenTable.pairs(store, "all").fitting(LIMITS)
    assert list(rows) == list(rows.by_prompt()) == list(rows.best_once()) == []
    assert counts == {"read": 0, "kept": 0}


def test_every_good_response_that_is_alone_is_a_best_one():
    def row(number: int, ranks: tuple[int, ...], *texts: str) -> Comparison:
        prompt = ({"role": "user", "content": "q"},)
        return Comparison(key=f"{number:016x}", prompt=prompt, responses=texts, ranks=ranks, source="f")

    # Of the pairs of one prompt the first whose best is never worse; g is bad in a row of its own, c in a pair.
    rows = [
        row(0, (0, 1), "b", "c"), row(1, (0, 1), "b", "d"), row(2, (0,), "e"), row(3, (0,), "f"), row(4, (1,), "g"),
        row(5, (0,), "g"), row(6, (0,), "c"),
    ]  # fmt: skip
    table = TokenTable.pairs(EncodedStore.made(rows, TEMPLATE, LIMITS), "best_worst")
    assert [one.comparison.responses[0] for one in table.best_once()] == ["b", "e", "f"]
