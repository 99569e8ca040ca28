"""Tab-separated files, in which a quote is text."""

import gzip

import pytest

from tokenward.data.files import tsv_rows
from tokenward.data.sources import rows
from tokenward.errors import UserError

TEXT = 'sentence\tlabel\n"half a quote , he said\t0\n\n`` a \'\' ""b"" , c "\t1\n'


def test_quotes_of_a_tsv_file_are_text_and_lines_are_lines(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text(TEXT)
    assert list(rows(path)) == [
        (f"{path}:2", {"sentence": '"half a quote , he said', "label": "0"}),
        (f"{path}:4", {"sentence": '`` a \'\' ""b"" , c "', "label": "1"}),
    ]
    packed = tmp_path / "a.tsv.gz"
    packed.write_bytes(gzip.compress(TEXT.encode()))
    assert [row for _, row in rows(packed)] == [row for _, row in rows(path)]
    assert [row for _, row in rows(tmp_path)] == 2 * [row for _, row in rows(path)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "a\tb\n1\t2\n1\t2\t3\n",
            [":3: 3 cells, the header has 2. Take tabs and line breaks out of the cells"],
        ),
        ("a\tb\n1\n", [":2: 1 cells, the header has 2"]),
        ("a\ta\n", [":1: a column name stands twice"]),
        ("a\tb\n1\rx\t2\n", [":2: not TSV", "line breaks", "JSONL"]),
        ("a\n" + "x" * 200_000 + "\n", [":2: not TSV", "131072", "JSONL"]),
    ],
)
def test_a_broken_tsv_file_is_named_with_line_and_remedy(tmp_path, content, expected):
    path = tmp_path / "a.tsv"
    path.write_bytes(content.encode())
    with pytest.raises(UserError) as error:
        list(tsv_rows(path))
    for part in expected:
        assert part in str(error.value)
