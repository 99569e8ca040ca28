"""Comparisons chosen by number are those that would have been built at once."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenward.data.choice import Choice, chosen_parts
from tokenward.data.lines import ComparisonFile, to_line
from tokenward.data.pairs import pair_places, pairs
from tokenward.types import Comparison, Span


@pytest.fixture
def file(tmp_path: Path) -> ComparisonFile:
    rows = [
        Comparison(
            key=f"{number:016x}",
            prompt=({"role": "user", "content": str(number // 2)},),
            responses=("a", f"b{number}", "c"),
            ranks=(1, 0, 2),
            source=f"f:{number}",
            scores=(0.0, 1.0, -1.0),
            spans=((Span(0, 1, 1.0),), (), (Span(0, 1, 2.0),)),
        )
        for number in range(4)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(map(to_line, rows)))
    return ComparisonFile(path)


def all_pairs(file: ComparisonFile) -> Choice:
    places = [pair_places(row, "all") for row in file]
    rows = [number for number, found in enumerate(places) for _ in found]
    return Choice.pairs(file, rows, [place for found in places for pair in found for place in pair])


def test_pairs_are_those_of_each_comparison(file: ComparisonFile) -> None:
    expected = [pair for row in file for pair in pairs(row, "all")]
    chosen = all_pairs(file)
    assert list(chosen) == expected
    assert list(chosen[2:7:2]) == expected[2:7:2]
    assert list(chosen.choose(np.array([5, 0, 5]))) == [expected[5], expected[0], expected[5]]
    assert list(chosen[:2].then(chosen[7:])) == expected[:2] + expected[7:]
    assert chosen[-1] == expected[-1]
    assert not chosen[:0]


def test_a_comparison_of_one_response_stands_among_pairs(tmp_path: Path, file: ComparisonFile) -> None:
    alone = Comparison(key="a" * 16, prompt=file[0].prompt, responses=("z",), ranks=(1,), source="f:9")
    path = tmp_path / "both.jsonl"
    path.write_text("".join(map(to_line, [file[0], alone, file[1]])))
    chosen = Choice.pairs(ComparisonFile(path), [0, 1, 2], [1, 2, 0, 1, 0], [2, 1, 2])
    expected = [pairs(file[0], "all")[1], alone, pairs(file[1], "all")[0]]
    assert list(chosen) == expected
    assert list(chosen.choose(np.array([1, 0])).then(chosen[2:])) == [alone, expected[0], expected[2]]
    assert pair_places(alone, "all", min_gap=0.5) == []


def test_whole_comparisons_are_those_of_the_file(file: ComparisonFile) -> None:
    whole = Choice.whole(file, range(4), [3, 3, 3, 3])
    assert list(whole) == list(file)
    assert list(whole.choose(np.array([3, 1]))) == [file[3], file[1]]


def test_a_group_has_the_responses_of_several_comparisons(file: ComparisonFile) -> None:
    chosen = all_pairs(file)  # b0 a, b0 c, a c, b1 a, ...
    group = chosen.grouped(np.array([0, 1, 6, 3]), np.array([0, 3, 4]))
    first = group[0]
    assert first.responses == ("b0", "a", "b1")
    assert first.ranks == (0, 1, 2)
    assert first.source == "f:0"
    assert first.scores is None
    assert first.spans == ((), (Span(0, 1, 1.0),), ())
    assert group[1].responses == ("c",)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.data())
def test_parts_of_items(sizes: list[int], data: st.DataObject) -> None:
    starts = np.cumsum([0, *sizes])
    numbers = data.draw(st.lists(st.integers(0, len(sizes) - 1), max_size=6))
    fresh, parts = chosen_parts(starts, np.array(numbers, np.int64))
    wanted = [list(range(starts[number], starts[number + 1])) for number in numbers]
    assert parts.tolist() == [part for item in wanted for part in item]
    assert fresh.tolist() == np.cumsum([0, *map(len, wanted)]).tolist()
