"""Every kind of source gives the same rows, and says where it broke."""

import csv
import gzip
import io
import itertools
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets.exceptions import DatasetNotFoundError

from tokenward.data.sources import rows
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


@pytest.mark.parametrize("name", MAKERS)
def test_each_file_kind_gives_the_rows_unchanged(tmp_path, name):
    path = MAKERS[name](tmp_path / name)
    assert [row for _, row in rows(str(path))] == ROWS


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("a.jsonl", ["1", "2", "3"]),
        ("a.csv", ["2", "4", "5"]),  # the first record has a line break inside: it spans lines 2 and 3
        ("a.json", ["row 1", "row 2", "row 3"]),
        ("a.parquet", ["row 1", "row 2", "row 3"]),
    ],
)
def test_where_is_the_line_or_the_row(tmp_path, name, places):
    made = MAKERS[name](tmp_path / name)
    if name == "a.csv":
        made.write_bytes(made.read_bytes().replace(b"\r\nand", b" and"))
    assert [where for where, _ in rows(made)] == [f"{made}:{place}" for place in places]


def test_blank_lines_are_passed_over_and_counted_as_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", '\ufeff{"a": 1}\r\n\n  \n{"a": 2}')
    assert list(rows(path)) == [(f"{path}:1", {"a": 1}), (f"{path}:4", {"a": 2})]


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
    with pytest.raises(UserError, match="begins with test"):
        names(str(tmp_path / "d"), split="test")


def test_a_file_whose_name_has_brackets_is_no_pattern(tmp_path):
    path = jsonl(tmp_path / "a[1].jsonl")
    assert len(list(rows(str(path)))) == 3


def test_a_saved_data_set_and_its_splits(tmp_path):
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(str(tmp_path / "one"))
    both = datasets.DatasetDict({"train": one, "test": one.select([2])})
    both.save_to_disk(str(tmp_path / "both"))
    datasets.DatasetDict({"test_sft": one, "test_prefs": one}).save_to_disk(str(tmp_path / "tests"))

    assert [row for _, row in rows(str(tmp_path / "one"))] == ROWS
    assert [row for _, row in rows(str(tmp_path / "both"))] == ROWS
    assert list(rows(tmp_path / "both", split="test")) == [(f"{tmp_path / 'both'}/test:row 1", ROWS[2])]
    with pytest.raises(UserError, match="tset is no split"):
        list(rows(tmp_path / "both", split="tset"))
    with pytest.raises(UserError, match="no train: test_prefs, test_sft"):
        list(rows(tmp_path / "tests"))
    with pytest.raises(UserError, match="one data set without splits"):
        list(rows(tmp_path / "one", split="train"))


def test_a_damaged_saved_data_set_says_so(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "one"))
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(UserError, match="not a whole folder"):
        list(rows(tmp_path / "one"))


def test_jsonl_streams(tmp_path):
    path = jsonl(tmp_path / "a.jsonl")
    path.write_text(path.read_text() + "not json\n")
    assert [row for _, row in itertools.islice(rows(path), 3)] == ROWS


def test_parquet_streams(tmp_path, monkeypatch):
    """What cannot be read lies behind what was asked for."""
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
    ("a.jsonl", b'{"a": 1}\n{"a": }\n', ":2: not JSON"),
    ("a.jsonl", b'{"a": 1}\n{"a": "b', ":2: not JSON"),
    ("a.jsonl", b'{"a": 1}\n\n["b"]\n', ":3: found a list of 1"),
    ("a.jsonl", b"5\n", ":1: found the number 5"),
    ("a.jsonl", b'[\n{"a": 1}\n]', "name it .json"),
    ("a.jsonl", b"[" * 100_000, ":1: not JSON"),
    ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', ":2: not UTF-8: byte 0xe9 at position 7"),
    ("a.json", b'{"a": 1}\n{"a": 2}\n', "name the file .jsonl"),
    ("a.json", b'[{"a": 1},\n{"a"}]', ":2: not JSON"),
    ("a.json", b'[{"a": 1}, 2]', ":row 2: found the number 2"),
    ("a.json", b'{"a": [1], "b": [2]}', "found 2 lists (a, b)"),
    ("a.json", b'{"a": 1}', "an object without a list"),
    ("a.json", b'"a"', "found text"),
    ("a.json", b'[{"a":\n"\xe9"}]', ":2: not UTF-8"),
    ("a.csv", b"a,b\n1,\xe9\n", ":2: not UTF-8"),
    ("a.csv", b"a,b\n1,2\n1,2,3\n", ":3: 3 cells, the header has 2"),
    ("a.csv", b"a,b\n1\n", ":2: 1 cells, the header has 2"),
    ("a.csv", b'a,b\n"1"x,2\n', ":2: not CSV"),
    ("a.csv", b'a,b\n"1,2\n', "not CSV"),
    ("a.csv", b"a,a\n1,2\n", "stands twice"),
    ("a.csv", b"a\n" + b"x" * 200_000 + b"\n", ":2: not CSV"),
    ("a.jsonl.gz", b'{"a": 1}\n', "not a whole gzip file"),
    ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 500)[:-12], "not a whole gzip file"),
    ("a.parquet", b"PAR1 no", "not a whole Parquet file"),
    ("a.txt", b"", "cannot read .txt"),
    ("a.parquet.gz", b"", "cannot read .parquet.gz"),
    ("data", b"", "a name without extension"),
]


def test_a_broken_file_is_named_with_the_line(tmp_path):
    for name, content, expected in BROKEN:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as error:
            list(rows(str(tmp_path / name)))
        assert str(error.value).startswith(str(tmp_path / name))
        assert expected in str(error.value)


def test_a_missing_path_names_the_nearest(tmp_path, monkeypatch):
    jsonl(tmp_path / "sets" / "train.jsonl")
    for given, meant in {"sets/tran.jsonl": "sets/train.jsonl", "set/train.jsonl": "sets"}.items():
        with pytest.raises(UserError, match="no such file or folder") as error:
            list(rows(str(tmp_path / given)))
        assert f"Did you mean {tmp_path / meant}?" in str(error.value)
    with pytest.raises(UserError, match=r"holds: train\.jsonl\."):
        list(rows(str(tmp_path / "sets" / "zzz")))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="Did you mean sets/train"):  # no hub name: sets/ is here
        list(rows("sets/trains"))
    with pytest.raises(UserError, match=r"no file matches this pattern"):
        list(rows("sets/*.csv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no data file"):
        list(rows("empty"))


def test_split_and_subset_are_refused_where_they_mean_nothing(tmp_path):
    path = jsonl(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="has no splits"):
        list(rows(path, split="test"))
    for source in (path, tmp_path / "*.jsonl"):
        with pytest.raises(UserError, match=r"data.subset: en"):
            list(rows(source, subset="en"))
    with pytest.raises(UserError, match="has no folder of this name"):
        list(rows(tmp_path, subset="en"))


@pytest.fixture
def hub(monkeypatch):
    """A hub with one data set; the calls made to it."""
    calls = []

    def load_dataset(name, subset, *, streaming):
        calls.append((name, subset, streaming))
        if name != "owner/prefs-v1.5":
            raise DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")
        parts = {"train": ROWS, "test": ROWS[:1]}
        return datasets.IterableDatasetDict(
            {
                k: datasets.IterableDataset.from_generator(lambda part=part: iter(part))
                for k, part in parts.items()
            }
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_hub_name_streams_the_split(hub):
    assert [row for _, row in rows("owner/prefs-v1.5")] == ROWS
    assert list(rows("owner/prefs-v1.5", split="test", subset="en")) == [
        ("owner/prefs-v1.5/test:row 1", ROWS[0])
    ]
    assert hub == [("owner/prefs-v1.5", None, True), ("owner/prefs-v1.5", "en", True)]
    with pytest.raises(UserError, match="dev is no split"):
        list(rows("owner/prefs-v1.5", split="dev"))


def test_hub_failures_speak_to_the_user(hub, monkeypatch):
    with pytest.raises(UserError, match="doesn't exist on the Hub"):
        list(rows("owner/none"))

    def broken(*_, **__):
        def generate():
            yield ROWS[0]
            raise ConnectionError("reset by peer")

        return datasets.IterableDatasetDict({"train": datasets.IterableDataset.from_generator(generate)})

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(UserError, match=r"owner/prefs: .*reset by peer"):
        list(rows("owner/prefs"))


def test_a_missing_data_file_is_never_asked_of_the_hub(hub):
    with pytest.raises(UserError, match=r"nowhere/a\.jsonl: no such file or folder"):
        list(rows("nowhere/a.jsonl"))
    assert hub == []
