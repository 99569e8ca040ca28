"""Writing a split row by row gives the same as reading everything at once, and leaves no partial files."""

import gc
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenward.data.files import from_line, read_comparisons, to_line
from tokenward.data.prepare import Dropped, Usable, load, read
from tokenward.data.split import is_eval
from tokenward.data.stream import FILES, PROMPT_TRAINS, write_split
from tokenward.errors import UserError
from tokenward.types import Comparison, Span


def pair(prompt, chosen="yes", rejected="no"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def written(folder, train, evaluation=None, *, share=0.0, seed=0):
    """Writes the split of some rows; returns the counts and the lines of each file."""
    readings = []
    for name, rows in (("train", train), ("test", evaluation)):
        if rows is not None:
            (folder / f"{name}.json").write_text(json.dumps(rows))
            readings.append(read(folder / f"{name}.json").rows)
    out = folder / "out"
    out.mkdir(exist_ok=True)
    found = write_split(out, readings[0], share=share, seed=seed, evaluation=(readings[1:] or [None])[0])
    return found, {file.name: list(map(json.loads, file.read_bytes().splitlines())) for file in out.iterdir()}


TEXT = st.sampled_from(["a", "b", "c", "", " ", "\u2028 é"])
RANKED = st.fixed_dictionaries(
    {
        "prompt": TEXT,
        "responses": st.lists(TEXT, min_size=2, max_size=3),
        "ranks": st.lists(st.integers(0, 2), min_size=3, max_size=3),
    }
).map(lambda row: {**row, "ranks": row["ranks"][: len(row["responses"])]})


@given(st.lists(RANKED, min_size=1, max_size=30), st.integers(0, 3))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_the_files_hold_what_reading_at_once_gives(tmp_path_factory, rows, seed):
    folder = tmp_path_factory.mktemp("data")
    (folder / "train.json").write_text(json.dumps(rows))
    loaded = load(folder / "train.json")
    sides = {
        side: [row for row in loaded.comparisons if is_eval(row, 0.3, seed) == side] for side in (False, True)
    }
    if not sides[False]:
        with pytest.raises(UserError) as error:
            written(folder, rows, share=0.3, seed=seed)
        assert error.value.code == "no-rows"
        assert list((folder / "out").iterdir()) == []
        return
    found, lines = written(folder, rows, share=0.3, seed=seed)
    assert list(read_comparisons(folder / "out" / "train.jsonl")) == sides[False]
    assert list(read_comparisons(folder / "out" / "eval.jsonl")) == sides[True]
    assert lines["dropped.jsonl"] == [row._asdict() for row in loaded.dropped]
    assert list(found.counts.items()) == list(loaded.counts.items())
    assert found.notes == loaded.notes
    assert (found.train, found.eval) == (len(sides[False]), len(sides[True]))
    assert sorted(lines) == sorted(FILES)


def test_eval_rows_of_their_own_source_have_no_training_prompt(tmp_path):
    train = [pair("a"), pair("b"), pair("c", "x", "x")]
    test = [pair("b", "other"), pair("c"), pair("d"), pair("d"), pair("", "y")]
    found, lines = written(tmp_path, train, test)
    assert [row["prompt"][0]["content"] for row in lines["train.jsonl"]] == ["a", "b"]
    assert [row["prompt"][0]["content"] for row in lines["eval.jsonl"]] == ["c", "d"]
    assert found.counts == {"read": 3, "kept": 2, "identical responses": 1}
    assert found.evaluation == {"read": 5, "kept": 2, PROMPT_TRAINS: 1, "duplicate": 1, "empty prompt": 1}
    assert (found.train, found.eval) == (2, 2)
    wheres = [(row["where"].rsplit("/")[-1], row["reason"]) for row in lines["dropped.jsonl"]]
    assert wheres[1] == ("test.json:row 1", PROMPT_TRAINS)
    assert sorted(lines) == sorted(FILES)


SHORT = st.sampled_from(["", "p", "q", "r"])
PAIRS = st.lists(st.builds(pair, SHORT, SHORT, SHORT), min_size=1, max_size=8)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(PAIRS, PAIRS)
def test_no_row_is_lost_and_no_prompt_is_on_both_sides(tmp_path_factory, train, test):
    train.append(pair("always"))
    found, lines = written(tmp_path_factory.mktemp("both"), train, test)
    for counts, rows in ((found.counts, train), (found.evaluation, test)):
        assert counts["read"] == len(rows)
        assert sum(counts.values()) == 2 * len(rows)
    assert len(lines["dropped.jsonl"]) + found.train + found.eval == len(train) + len(test)
    sides = [{json.dumps(row["prompt"]) for row in lines[f"{side}.jsonl"]} for side in ("train", "eval")]
    assert sides[0].isdisjoint(sides[1])


def test_the_error_when_nothing_is_left_names_the_cause(tmp_path):
    with pytest.raises(UserError, match="all 1 are eval rows") as error:
        written(tmp_path, [pair("a")], share=0.999)
    assert (error.value.code, error.value.key) == ("no-rows", "data.eval")
    rows = [pair("a", "x", "x"), pair("", "x"), pair("b", "x", "x")]
    with pytest.raises(UserError, match=r"identical responses: 2, the first is .*train.json:row 1") as error:
        written(tmp_path, rows, share=0.1)
    assert (error.value.code, error.value.key) == ("no-rows", "data.source")


def test_a_malformed_row_leaves_no_file(tmp_path):
    with pytest.raises(UserError, match="chosen: found the number 1"):
        written(tmp_path, [pair("p"), pair("p", 1)], share=0.3)
    assert list((tmp_path / "out").iterdir()) == []


def comparison(number: int) -> Comparison:
    return Comparison(
        key=f"{number:016x}",
        prompt=({"role": "user", "content": f"{number} \u2028\r\n é"},),
        responses=("a\n", "ß"),
        ranks=(0, 1),
        source=f"f:{number}",
        scores=(0.5, -1.0) if number % 2 else None,
        spans=((Span(0, 1, 2.0),), ()) if number % 3 else None,
    )


def test_comparisons_survive_being_stored():
    for number in range(9):
        row = comparison(number)
        assert from_line(to_line(row)) == row


def test_rows_are_read_one_by_one(tmp_path):
    def alive() -> int:
        return sum(type(item) is Comparison for item in gc.get_objects())

    def results():
        for number in range(50):
            yield Usable(comparison(number), 0, 0) if number % 5 else Dropped(f"f:{number}", "reason")
            assert alive() - before <= 3

    before = alive()
    found = write_split(tmp_path, results(), share=0.0, seed=0)
    assert found.counts == {"read": 50, "kept": 40, "reason": 10}
