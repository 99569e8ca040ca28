"""Files that name splits are splits, wherever they lie; what is held out may have a source of its own."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenward.data.prepare import load, read
from tokenward.data.sources import rows, split_of
from tokenward.data.stream import PROMPT_TRAINS, write_split
from tokenward.errors import UserError


def pair(prompt, chosen="yes", rejected="no", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def folder(place, *names):
    """Files of one row each, whose prompt is the file's name."""
    for name in names:
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(pair(name)) + "\n")
    return place


def names(source, **options):
    return [row["prompt"] for _, row in rows(source, **options)]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("TRAIN-00000-of-00002", "train"),
        ("train_3", "train"),
        ("training", "train"),
        ("train_prefs-00000-of-00001", "train_prefs"),
        ("test_prefs", "test_prefs"),
        ("validation-0", "validation"),
        ("dev", "dev"),
        ("pairs-test", "test"),
        ("pairs_train_001", "train"),
        ("latest", None),
        ("testament", None),
        ("trained", None),
        ("test-drive-cars", "test"),
        ("my_evaluation_notes", None),
        ("a", None),
    ],
)
def test_what_a_name_says(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize("place", ["", "data"])
def test_the_split_train_is_read_and_the_others_are_said(tmp_path, place):
    made = ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl")
    folder(tmp_path / place, *made)
    (tmp_path / "dataset_infos.json").write_text("{}")
    said = []
    assert names(tmp_path, say=said.append) == list(made[:2])
    assert said == [f"{tmp_path}: the split train is read; also there: test"]
    assert names(tmp_path, split="test") == [made[2]]
    assert names(str(tmp_path / place / "train*.jsonl")) == list(made[:2])
    assert names(str(tmp_path / place / "*.jsonl"), split="test") == [made[2]]
    with pytest.raises(UserError, match="tets is no split"):
        names(tmp_path, split="tets")
    with pytest.raises(UserError, match="matches files of a split"):
        names(str(tmp_path / place / "*.jsonl"))


def test_several_splits_and_no_plain_train_are_listed(tmp_path):
    folder(tmp_path, "train_prefs.jsonl", "train_sft.jsonl", "test_prefs.jsonl")
    with pytest.raises(UserError, match="several splits and no train"):
        names(tmp_path)
    assert names(tmp_path, split="train_prefs") == ["train_prefs.jsonl"]
    assert names(folder(tmp_path / "one", "test_prefs.jsonl")) == ["test_prefs.jsonl"]


def test_a_file_of_no_split_beside_splits_is_not_passed_over(tmp_path):
    folder(tmp_path, "train.jsonl", "more.jsonl")
    with pytest.raises(UserError, match="are of a split"):
        names(tmp_path)
    assert names(tmp_path, split="train") == ["train.jsonl"]
    assert names([str(tmp_path / "train.jsonl"), str(tmp_path / "more.jsonl")]) == [
        "train.jsonl",
        "more.jsonl",
    ]


def test_folders_may_be_splits_or_subsets(tmp_path):
    folder(tmp_path / "a", "train/0.jsonl", "test/0.jsonl")
    assert names(tmp_path / "a") == ["train/0.jsonl"]
    assert names(tmp_path / "a", split="test") == ["test/0.jsonl"]
    folder(tmp_path / "b", "kind/train.jsonl", "kind/test.jsonl", "data/rude/train.jsonl", "empty/a.txt")
    assert names(tmp_path / "b", subset="kind") == ["kind/train.jsonl"]
    assert names(tmp_path / "b", subset="kind", split="test") == ["kind/test.jsonl"]
    assert names(tmp_path / "b", subset="rude") == ["data/rude/train.jsonl"]
    for subset in ("en", None):
        with pytest.raises(UserError, match="kind, rude"):
            names(tmp_path / "b", subset=subset)


def written(place, train, evaluation, **options):
    for name, given_rows in (("train", train), ("test", evaluation)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given_rows))
    out = place / "out"
    out.mkdir(exist_ok=True)
    readings = [read(place / f"{name}.jsonl").rows for name in ("train", "test")]
    found = write_split(out, readings[0], share=0.0, seed=0, evaluation=readings[1], **options)
    lines = {
        path.name: [json.loads(line) for line in path.read_text().splitlines()] for path in out.iterdir()
    }
    return found, lines


def test_rows_to_evaluate_on_are_those_whose_prompt_does_not_train(tmp_path):
    train = [pair("a"), pair("b"), pair("c", "x", "x")]
    test = [pair("b", "other"), pair("c"), pair("d"), pair("d"), pair("", "y")]
    found, lines = written(tmp_path, train, test)
    assert [row["prompt"][0]["content"] for row in lines["train.jsonl"]] == ["a", "b"]
    assert [row["prompt"][0]["content"] for row in lines["eval.jsonl"]] == ["c", "d"]
    assert found.counts == {"read": 3, "kept": 2, "identical responses": 1}
    assert found.evaluation == {"read": 5, "kept": 2, PROMPT_TRAINS: 1, "duplicate": 1, "empty prompt": 1}
    assert (found.train, found.eval) == (2, 2)
    wheres = [(row["where"].rsplit("/")[-1], row["reason"]) for row in lines["dropped.jsonl"]]
    assert wheres[1] == ("test.jsonl:1", PROMPT_TRAINS)
    assert sorted(lines) == ["dropped.jsonl", "eval.jsonl", "train.jsonl"]


TEXT = st.sampled_from(["", "p", "q", "r"])
ROWS = st.lists(st.builds(pair, TEXT, TEXT, TEXT), min_size=1, max_size=8)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(ROWS, ROWS)
def test_no_row_is_lost_and_no_prompt_is_on_both_sides(tmp_path_factory, train, test):
    place = tmp_path_factory.mktemp("both")
    train.append(pair("always"))
    found, lines = written(place, train, test)
    for counts, given_rows in ((found.counts, train), (found.evaluation, test)):
        assert counts["read"] == len(given_rows)
        assert sum(counts.values()) == 2 * len(given_rows)
    assert len(lines["dropped.jsonl"]) + found.train + found.eval == len(train) + len(test)
    sides = [{json.dumps(row["prompt"]) for row in lines[f"{side}.jsonl"]} for side in ("train", "eval")]
    assert sides[0].isdisjoint(sides[1])


def test_the_advice_where_nothing_is_left_names_what_helps(tmp_path):
    def split(rows, eval_rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_split(tmp_path, read(path).rows, share=eval_rows, seed=0)

    with pytest.raises(UserError, match="all 1 are held out"):
        split([pair("a")], 0.999)
    with pytest.raises(UserError) as error:
        split([pair("a", "x", "x"), pair("", "x"), pair("b", "x", "x")], 0.1)
    assert "eval" not in str(error.value)
    assert f"identical responses: 2, the first is {tmp_path / 'rows.jsonl'}:1" in str(error.value)


def test_load_tells_which_split_was_read(tmp_path):
    folder(tmp_path, "train.jsonl", "test.jsonl")
    assert [row.prompt[0]["content"] for row in load(tmp_path).comparisons] == ["train.jsonl"]
    reading = read(tmp_path)
    assert len(list(reading.rows)) == 1
    assert reading.said == [f"{tmp_path}: the split train is read; also there: test"]
