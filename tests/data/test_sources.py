"""Every kind of source gives the same rows, and errors name the file and line."""

import csv
import gzip
import io
import itertools
import json
import os
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets.exceptions import DatasetNotFoundError

from tokenward.data import files
from tokenward.data.sources import rows, split_of
from tokenward.errors import UserError

ROWS = [
    {"prompt": 'a "quoted" \\ back\\nslash', "chosen": "line\nbreak\r\nand\u2028more", "rejected": "None"},
    {"prompt": "null", "chosen": "👩‍👩‍👧 é", "rejected": "שלום, עולם\u200f"},
    {"prompt": "tab\there, comma", "chosen": "NaN", "rejected": "[1, 2]"},
]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def jsonl(path, given=ROWS, **options):
    return write(path, "".join(json.dumps(row, **options) + "\n" for row in given))


def csv_file(path):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(ROWS[0]))
    writer.writeheader()
    writer.writerows(ROWS)
    return write(path, text.getvalue())


def parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


MAKERS = {
    "a.jsonl": jsonl,
    "a.jsonl.gz": jsonl,
    "A.JSONL": lambda path: jsonl(path, ensure_ascii=False),
    "a.json": lambda path: write(path, json.dumps(ROWS, indent=1)),
    "a.json.gz": lambda path: write(path, json.dumps({"version": 1, "data": ROWS})),
    "a.csv": csv_file,
    "a.csv.gz": csv_file,
    "a.parquet": parquet,
}


def refused(source, code, *parts, **options):
    """Reading this source is an error with this code, whose message contains the parts."""
    with pytest.raises(UserError) as error:
        list(rows(source, **options))
    assert error.value.code == code
    assert [part for part in parts if part not in str(error.value)] == []
    return error.value


@pytest.mark.parametrize("name", MAKERS)
def test_each_kind_of_file_gives_the_rows_unchanged(tmp_path, name):
    path = MAKERS[name](tmp_path / name)
    assert [row for _, row in rows(str(path))] == ROWS


def test_positions_are_lines_or_rows(tmp_path):
    def positions(name):
        path = MAKERS[name](tmp_path / name)
        return [where.removeprefix(f"{path}:") for where, _ in rows(path)]

    assert positions("a.jsonl") == ["1", "2", "3"]
    # The csv module counts \r\n and \n inside a cell as line ends: the first record spans three lines.
    assert positions("a.csv") == ["2", "5", "6"]
    assert positions("a.json") == positions("a.parquet") == ["row 1", "row 2", "row 3"]


def test_blank_lines_are_skipped_but_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", '\ufeff{"a": 1}\r\n\n  \n{"a": 2}')
    assert list(rows(path)) == [(f"{path}:1", {"a": 1}), (f"{path}:4", {"a": 2})]


def test_quotes_in_a_tsv_file_are_text(tmp_path):
    text = 'sentence\tlabel\n"half a quote , he said\t0\n\n`` a \'\' ""b"" , c "\t1\n'
    path = write(tmp_path / "a.tsv", text)
    expected = [
        {"sentence": '"half a quote , he said', "label": "0"},
        {"sentence": '`` a \'\' ""b"" , c "', "label": "1"},
    ]
    assert list(rows(path)) == [(f"{path}:2", expected[0]), (f"{path}:4", expected[1])]
    write(tmp_path / "a.tsv.gz", text)
    assert [row for _, row in rows(tmp_path)] == 2 * expected


def test_files_by_glob_list_and_folder_in_sorted_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "bc.jsonl", "c.csv"):
        write(tmp_path / "d" / name, f'{{"n": "{name}"}}' if name != "c.csv" else "n\nc.csv\n")
    write(tmp_path / "d" / "README.md", "no data")
    (tmp_path / "d" / "folder.jsonl").mkdir()

    def names(source, **options):
        return [row["n"] for _, row in rows(source, **options)]

    assert names(str(tmp_path / "d" / "*.jsonl")) == ["a.jsonl", "b.jsonl", "bc.jsonl"]
    assert names(str(tmp_path / "**" / "*.csv")) == ["c.csv"]
    assert names([str(tmp_path / "d" / "b.jsonl"), tmp_path / "d" / "a.jsonl"]) == ["b.jsonl", "a.jsonl"]
    assert names(str(tmp_path / "d")) == ["a.jsonl", "b.jsonl", "bc.jsonl", "c.csv"]
    assert names(str(tmp_path / "d"), split="b") == ["b.jsonl"]  # not every name with a b in front
    refused(tmp_path / "d", "unknown-split", split="test")
    # An existing file whose name has brackets is not a pattern.
    assert len(list(rows(str(jsonl(tmp_path / "a[1].jsonl"))))) == 3


def test_a_saved_data_set_and_its_splits(tmp_path):
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(str(tmp_path / "one"))
    both = datasets.DatasetDict({"train": one, "test": one.select([2])})
    both.save_to_disk(str(tmp_path / "both"))
    datasets.DatasetDict({"test_sft": one, "test_prefs": one}).save_to_disk(str(tmp_path / "tests"))

    assert [row for _, row in rows(str(tmp_path / "one"))] == ROWS
    assert [row for _, row in rows(str(tmp_path / "both"))] == ROWS
    assert list(rows(tmp_path / "both", split="test")) == [(f"{tmp_path / 'both'}/test:row 1", ROWS[2])]
    refused(tmp_path / "both", "unknown-split", "Did you mean test?", split="tset")
    refused(tmp_path / "tests", "ambiguous-split", "test_prefs, test_sft")
    refused(tmp_path / "one", "unknown-split", split="train")
    next((tmp_path / "one").glob("*.arrow")).unlink()
    refused(tmp_path / "one", "damaged-file")


def test_jsonl_streams(tmp_path):
    path = jsonl(tmp_path / "a.jsonl")
    path.write_text(path.read_text() + "not json\n")
    assert [row for _, row in itertools.islice(rows(path), 3)] == ROWS


def test_parquet_streams(tmp_path, monkeypatch):
    """The damaged part is after the rows that are asked for."""
    monkeypatch.setattr("tokenward.data.files._BATCH_ROWS", 10)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": list(range(1000))}), path, row_group_size=100)
    content = bytearray(path.read_bytes())
    group = pyarrow.parquet.ParquetFile(path).metadata.row_group(5).column(0)
    start = group.dictionary_page_offset or group.data_page_offset
    content[start : start + group.total_compressed_size] = b"\xff" * group.total_compressed_size
    path.write_bytes(content)
    assert next(itertools.islice(rows(path), 14, None)) == (f"{path}:row 15", {"a": 14})
    with pytest.raises((UserError, OSError)):
        list(rows(path))


BROKEN = [
    ("a.jsonl", b'{"a": 1}\n{"a": }\n', "not-json", ":2: "),
    ("a.jsonl", b'{"a": 1}\n\n["b"]\n', "not-an-object", ":3: found a list of 1"),
    ("a.jsonl", b'[\n{"a": 1}\n]', "not-json", "name it .json"),
    ("a.jsonl", b"[" * 100_000, "not-json", ":1: "),
    ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', "not-utf-8", ":2: not UTF-8: byte 0xe9 at position 7"),
    ("a.json", b'{"a": 1}\n{"a": 2}\n', "not-json", "name it .jsonl"),
    ("a.json", b'[{"a": 1},\n{"a"}]', "not-json", ":2: "),
    ("a.json", b'[{"a": 1}, 2]', "not-an-object", ":row 2: found the number 2"),
    ("a.json", b'{"a": [1], "b": [2]}', "not-a-list", "found 2 lists (a, b)"),
    ("a.json", b'{"a": 1}', "not-a-list", "an object without a list"),
    ("a.json", b'"a"', "not-a-list", "found text"),
    ("a.json", b'[{"a":\n"\xe9"}]', "not-utf-8", ":2: "),
    ("a.csv", b"a,b\n1,\xe9\n", "not-utf-8", ":2: "),
    ("a.csv", b"a,b\n1,2\n1,2,3\n", "not-a-table", ":3: 3 cells, but the header has 2"),
    ("a.csv", b"a,b\n1\n", "not-a-table", ":2: 1 cells, but the header has 2"),
    ("a.csv", b'a,b\n"1"x,2\n', "not-a-table", ":2: not CSV"),
    ("a.csv", b'a,b\n"1,2\n', "not-a-table", "not CSV"),
    ("a.csv", b"a,a\n1,2\n", "duplicate-column", "a, a"),
    ("a.tsv", b"a\tb\n1\t2\n1\t2\t3\n", "not-a-table", ":3: 3 cells"),
    ("a.tsv", b"a\tb\n1\rx\t2\n", "not-a-table", ":2: not TSV"),
    ("a.jsonl.gz", b'{"a": 1}\n', "damaged-file", "gzip"),
    ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 500, mtime=0)[:-12], "damaged-file", "gzip"),
    ("a.parquet", b"PAR1 no", "damaged-file", "Parquet"),
    ("a.txt", b"", "unknown-file-type", ".txt"),
    ("a.parquet.gz", b"", "unknown-file-type", ".parquet.gz"),
    ("data", b"", "unknown-file-type", "a name without extension"),
]


@pytest.mark.parametrize(("name", "content", "code", "part"), BROKEN)
def test_a_broken_file_is_named_with_the_line(tmp_path, name, content, code, part):
    (tmp_path / name).write_bytes(content)
    assert str(refused(str(tmp_path / name), code, part)).startswith(str(tmp_path / name))


def test_a_missing_path_names_the_nearest(tmp_path, monkeypatch):
    jsonl(tmp_path / "sets" / "train.jsonl")
    for given, meant in {"sets/tran.jsonl": "sets/train.jsonl", "set/train.jsonl": "sets"}.items():
        refused(str(tmp_path / given), "missing-file", f"Did you mean {tmp_path / meant}?")
    refused(str(tmp_path / "sets" / "zzz"), "missing-file", "contains: train.jsonl.")
    monkeypatch.chdir(tmp_path)
    refused("sets/trains", "missing-file", "Did you mean sets/train")  # not a hub name: sets/ exists
    refused("sets/*.csv", "missing-file")
    (tmp_path / "empty").mkdir()
    refused("empty", "missing-file")


def test_split_and_subset_are_refused_where_they_mean_nothing(tmp_path):
    path = jsonl(tmp_path / "a.jsonl")
    refused(path, "unknown-split", split="test")
    for source in (path, tmp_path / "*.jsonl", tmp_path):
        assert refused(source, "unknown-subset", "en", subset="en").key == "data.subset"


@pytest.fixture
def hub(monkeypatch):
    """A hub with one data set. Returns the list of calls."""
    calls = []

    def load_dataset(name, subset, *, streaming):
        calls.append((name, subset, streaming))
        if name != "owner/prefs-v1.5":
            raise DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        parts = {"train": ROWS, "test": ROWS[:1]}
        streams = {
            name: datasets.IterableDataset.from_generator(lambda part=part: iter(part))
            for name, part in parts.items()
        }
        return datasets.IterableDatasetDict(streams)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_hub_name_streams_the_split(hub):
    assert [row for _, row in rows("owner/prefs-v1.5")] == ROWS
    found = list(rows("owner/prefs-v1.5", split="test", subset="en"))
    assert found == [("owner/prefs-v1.5/test:row 1", ROWS[0])]
    assert hub == [("owner/prefs-v1.5", None, True), ("owner/prefs-v1.5", "en", True)]
    refused("owner/prefs-v1.5", "unknown-split", split="dev")


def test_errors_of_the_hub_name_the_data_set(hub, monkeypatch):
    refused("nowhere/a.jsonl", "missing-file")
    assert hub == []  # a missing file is never looked up on the hub
    refused("owner/none", "unreadable-hub-data", "doesn't exist on the Hub")

    def broken(*_, **__):
        def generate():
            yield ROWS[0]
            raise ConnectionError("reset by peer")

        return datasets.IterableDatasetDict({"train": datasets.IterableDataset.from_generator(generate)})

    monkeypatch.setattr(datasets, "load_dataset", broken)
    refused("owner/prefs", "unreadable-hub-data", "owner/prefs: ", "reset by peer")


def folder(place, *names):
    """Files of one row each, whose prompt is the name of the file."""
    for name in names:
        jsonl(place / name, [{"prompt": name, "chosen": "yes", "rejected": "no"}])
    return place


def names(source, **options):
    return [row["prompt"] for _, row in rows(source, **options)]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("TRAIN-00000-of-00002", "train"),
        ("train_3", "train"),
        ("training", "train"),
        ("train_prefs-00000-of-00001", "train_prefs"),
        ("validation-0", "validation"),
        ("dev", "dev"),
        ("pairs-test", "test"),
        ("pairs_train_001", "train"),
        ("test-drive-cars", "test"),
        *((name, None) for name in ("latest", "testament", "trained", "my_evaluation_notes", "a")),
    ],
)
def test_the_split_in_a_name(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize("place", ["", "data"])
def test_train_is_read_and_the_other_splits_are_named(tmp_path, place):
    made = ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl")
    folder(tmp_path / place, *made)
    (tmp_path / "dataset_infos.json").write_text("{}")
    lines = []
    assert names(tmp_path, say=lines.append) == list(made[:2])
    assert lines == [f"{tmp_path}: the split train is read; also there: test"]
    assert names(tmp_path, split="test") == [made[2]]
    assert names(str(tmp_path / place / "train*.jsonl")) == list(made[:2])
    assert names(str(tmp_path / place / "*.jsonl"), split="test") == [made[2]]
    refused(str(tmp_path / place / "*.jsonl"), "ambiguous-split")


def test_ambiguous_splits_are_not_read(tmp_path):
    folder(tmp_path / "a", "train_prefs.jsonl", "train_sft.jsonl", "test_prefs.jsonl")
    refused(tmp_path / "a", "ambiguous-split")
    assert names(tmp_path / "a", split="train_prefs") == ["train_prefs.jsonl"]
    assert names(folder(tmp_path / "one", "test_prefs.jsonl")) == ["test_prefs.jsonl"]
    # A file without a split beside files with one is not skipped silently.
    folder(tmp_path / "b", "train.jsonl", "more.jsonl")
    refused(tmp_path / "b", "ambiguous-split", "more.jsonl")
    assert names(tmp_path / "b", split="train") == ["train.jsonl"]


def test_folders_can_be_splits_or_subsets(tmp_path):
    folder(tmp_path / "a", "train/0.jsonl", "test/0.jsonl")
    assert names(tmp_path / "a") == ["train/0.jsonl"]
    assert names(tmp_path / "a", split="test") == ["test/0.jsonl"]
    folder(tmp_path / "b", "kind/train.jsonl", "kind/test.jsonl", "data/rude/train.jsonl", "empty/a.txt")
    assert names(tmp_path / "b", subset="kind") == ["kind/train.jsonl"]
    assert names(tmp_path / "b", subset="kind", split="test") == ["kind/test.jsonl"]
    assert names(tmp_path / "b", subset="rude") == ["data/rude/train.jsonl"]
    refused(tmp_path / "b", "unknown-subset", "kind, rude", subset="en")
    refused(tmp_path / "b", "missing-file", "kind, rude")


def test_a_cell_may_be_longer_than_python_allows_by_default(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n" + "x" * 200_000 + ",y\n")
    assert [row["a"] for _, row in rows(tmp_path / "a.csv")] == ["x" * 200_000]


def test_a_parquet_file_with_values_that_python_cannot_hold_is_named(tmp_path):
    offsets = pyarrow.array([0, 2], pyarrow.int32()).buffers()[1]
    text = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, pyarrow.py_buffer(b"\xff\xfe")])
    for column, code in ((text, "bad-value"), (pyarrow.array([2**62], pyarrow.timestamp("us")), "bad-value")):
        pyarrow.parquet.write_table(pyarrow.table({"a": ["x"], "b": column}), tmp_path / "a.parquet")
        refused(str(tmp_path / "a.parquet"), code, "one of the rows 1 to 256")
    pyarrow.parquet.write_table(
        pyarrow.table([pyarrow.array(["x"]), pyarrow.array(["y"])], names=["a", "a"]), tmp_path / "a.parquet"
    )
    refused(str(tmp_path / "a.parquet"), "duplicate-column", "a, a")


@pytest.mark.parametrize("source", ["", " ", "a\0b", "x" * 300, "~nobodyhere/a.jsonl"])
def test_a_source_that_cannot_be_a_path_is_refused(source):
    refused(source, "bad-source", "the source")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    refused(str(tmp_path / "a.jsonl"), "bad-source", "is a pipe or a device")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv.gz", "a.json"])
def test_a_line_that_no_memory_holds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A packed file of a few kilobytes can be a line of gigabytes."""
    monkeypatch.setattr(files, "LONGEST_LINE", 1000)
    data = b'{"a": 1}\n' + b"x" * 1001
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(UserError, match=":2: the line has more than 1,000 bytes") as caught:
        list(rows(tmp_path / name))
    assert caught.value.code == "too-large"
