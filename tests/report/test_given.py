"""Spans from a file: what is read, what is refused, and what the page shows."""

import shutil
from base64 import b64decode
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tests.report.test_report import data_of, write_lines
from tokenward import cli
from tokenward.errors import UserError
from tokenward.report.collect import RunFolder
from tokenward.report.given import read_spans
from tokenward.report.page import make_report
from tokenward.report.pairs import PairReader, draw
from tokenward.types import Span

RUN = Path("runs/quickstart")
OTHER = {"prompt": "x", "response": "y", "spans": []}


@pytest.fixture
def reader(tiny_oracle: Path) -> PairReader:
    found = PairReader.open(RunFolder.read(RUN))
    assert found is not None
    return found


def written(path: Path, *lines: dict) -> Path:
    write_lines(path, list(lines))
    return path


def test_a_response_is_named_by_its_texts_or_by_its_key(reader: PairReader, tmp_path: Path) -> None:
    (one, _), (other, _), *_ = reader.places()
    second = reader.pair(other).comparison
    file = written(
        tmp_path / "spans.jsonl",
        {"key": one.keys[0], "spans": [[0, 2, 1.0], [3, 4, -1]]},
        {"prompt": second.prompt[0]["content"], "response": second.responses[1], "spans": []},
        {"prompt": "never asked", "response": "never said", "spans": [[0, 9999, 1]]},
    )
    given = read_spans(file, reader)
    assert given.spans == {one.keys[0]: (Span(0, 2, 1.0), Span(3, 4, -1.0)), other.keys[1]: ()}
    assert (given.name, given.unmatched) == ("spans.jsonl", 1)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"key": "KEY"}, "spans"),
        ({"key": "KEY", "spans": 3}, "spans"),
        ({"key": "KEY", "spans": [[0, 1]]}, "spans[0]"),
        ({"key": "KEY", "spans": [[2, 2, 1]]}, "spans[0]"),
        ({"key": "KEY", "spans": [[0, 4000, 1]]}, "spans[0]"),
        ({"key": "KEY", "spans": [[0, 1, "x"]]}, "spans[0]"),
        ({"key": "KEY", "prompt": "x", "spans": []}, "the key or the two texts"),
        ({"prompt": "x", "spans": []}, "response"),
        ({"key": "KEY", "span": []}, "span: is not a known field"),
    ],
)
def test_a_wrong_line_is_named(reader: PairReader, tmp_path: Path, line: dict, words: str) -> None:
    key = next(reader.places())[0].keys[0]
    wrong = {name: key if value == "KEY" else value for name, value in line.items()}
    with pytest.raises(UserError) as error:
        read_spans(written(tmp_path / "spans.jsonl", OTHER, wrong), reader)
    assert error.value.code == "bad-row"
    assert "spans.jsonl:2: " in str(error.value)
    assert words in str(error.value)


def test_other_responses_repeated_ones_and_runs_without_scores_are_refused(
    reader: PairReader, tmp_path: Path
) -> None:
    for lines, code in (([OTHER], "no-rows"), ([OTHER, OTHER], "duplicate-row")):
        with pytest.raises(UserError) as error:
            read_spans(written(tmp_path / "a.jsonl", *lines), reader)
        assert error.value.code == code
    shutil.copytree(RUN, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "scores")
    with pytest.raises(UserError) as error:
        make_report(tmp_path / "run", spans=tmp_path / "a.jsonl")
    assert error.value.code == "no-pairs"


def test_pairs_with_given_spans_are_drawn_up_to_half_of_the_page(reader: PairReader) -> None:
    keys = {place.keys[0] for place, _ in list(reader.places())[:6]}
    drawn = draw(reader, 8, sample=5, wanted=keys)
    wanted = [place for place, why in zip(drawn.places, drawn.reasons, strict=True) if "spans" in why]
    assert (len(wanted), len(drawn.places)) == (4, 8)
    assert all(place.keys[0] in keys for place in wanted)


def test_given_spans_replace_the_spans_of_the_data(copied_run: Path, tmp_path: Path) -> None:
    reader = PairReader.open(RunFolder.read(RUN))
    assert reader is not None
    place = next(reader.places())[0]
    size = len(reader.pair(place).comparison.responses[0])
    file = written(tmp_path / "marks.jsonl", {"key": place.keys[0], "spans": [[size - 3, size, -2.0]]}, OTHER)
    result = CliRunner().invoke(cli.app, ["report", str(RUN), "--spans", str(file)])
    assert result.exit_code == 0, result.output
    html = (RUN / "report" / "index.html").read_text()
    assert "spans of <code>marks.jsonl</code>, in 1 responses; 1 of its lines name no response" in html
    known = {
        (pair["number"], side): np.frombuffer(b64decode(response["values"]["known"]), "<f4")
        for pair in data_of(html)["comparisons"]
        for side, response in enumerate(pair["responses"])
    }
    assert [name for name, values in known.items() if values.any()] == [(place.number, 0)]
    assert set(known[place.number, 0]) == {0.0, -2.0}
    plain = make_report(RUN).html
    for words in ("n = 1)", "with spans from the file"):  # the figures are of these spans
        assert words in html
        assert words not in plain


def test_a_score_that_is_missing_for_a_response_is_left_out(copied_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(RUN, other)
    reader = PairReader.open(RunFolder.read(RUN))
    assert reader is not None
    keys = [place.keys[0] for place, _ in reader.places()][:2]
    spans = written(tmp_path / "a.jsonl", *({"key": key, "spans": [[0, 2, 1.0]]} for key in keys))
    assert "<b>log_ratio of other</b>" in make_report(RUN, also=[other], spans=spans).html
    for path in (other / "scores").glob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.filter(pc.field("key") != keys[0]), path)
    lacking = make_report(RUN, also=[other], spans=spans).html
    assert "<b>log_ratio of other</b>" not in lacking
    assert "<b>surprisal</b>" in lacking
