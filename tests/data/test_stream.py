"""Writing a split row by row gives what reading everything at once gives, and leaves nothing half done."""

import gc
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenward.data.files import from_line, read_comparisons, to_line
from tokenward.data.prepare import Dropped, Usable, load, read
from tokenward.data.split import split
from tokenward.data.stream import FILES, write_split
from tokenward.errors import UserError
from tokenward.types import Comparison, Span


def source(folder: Path, rows: list[dict]) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def written(folder: Path, path: Path, *, eval_rows: float = 0.3, seed: int = 0):
    return write_split(folder, read(path).rows, share=eval_rows, seed=seed)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


TEXT = st.sampled_from(["a", "b", "c", "", " ", "\u2028 é"])
ROWS = st.lists(
    st.fixed_dictionaries({"prompt": TEXT, "responses": st.lists(TEXT, min_size=2, max_size=3)}).flatmap(
        lambda row: st.lists(
            st.integers(0, 2), min_size=len(row["responses"]), max_size=len(row["responses"])
        ).map(lambda ranks: {**row, "ranks": ranks})
    ),
    min_size=1,
    max_size=30,
)


@given(ROWS, st.integers(0, 3))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_the_files_hold_what_reading_at_once_gives(tmp_path_factory, rows, seed):
    folder = tmp_path_factory.mktemp("data")
    path = source(folder, rows)
    loaded = load(path)
    parts = split(loaded.comparisons, share=0.3, seed=seed)
    if not parts.train:
        with pytest.raises(UserError, match="no comparison is left to train on"):
            written(folder, path, seed=seed)
        assert [item.name for item in folder.iterdir()] == ["pairs.jsonl"]
        return
    found = written(folder, path, seed=seed)
    assert list(read_comparisons(folder / "train.jsonl")) == parts.train
    assert list(read_comparisons(folder / "eval.jsonl")) == parts.eval
    assert lines(folder / "dropped.jsonl") == [row._asdict() for row in loaded.dropped]
    assert list(found.counts.items()) == list(loaded.counts.items())
    assert found.notes == loaded.notes
    assert (found.train, found.eval) == (len(parts.train), len(parts.eval))
    assert sorted(item.name for item in folder.iterdir()) == sorted([*FILES, "pairs.jsonl"])


def test_a_malformed_row_leaves_no_file(tmp_path):
    path = source(
        tmp_path,
        [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": 1, "rejected": "b"}],
    )
    with pytest.raises(UserError, match="chosen: found the number 1"):
        written(tmp_path, path)
    assert [item.name for item in tmp_path.iterdir()] == ["pairs.jsonl"]


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


def test_a_line_is_the_comparison():
    for number in range(9):
        row = comparison(number)
        assert from_line(to_line(row)) == row


def test_rows_are_read_one_by_one(tmp_path):
    seen = []

    def results():
        for number in range(50):
            seen.append(number)
            yield Usable(comparison(number), 0, 0) if number % 5 else Dropped(f"f:{number}", "reason")

    def alive() -> int:
        return sum(type(item) is Comparison for item in gc.get_objects())

    def watched():
        for row in results():
            assert alive() - before <= 3
            yield row

    before = alive()
    found = write_split(tmp_path, watched(), share=0.0, seed=0)
    assert found.counts == {"read": 50, "kept": 40, "reason": 10}
    assert len(seen) == 50
