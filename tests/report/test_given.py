"""Spans from a file of their own: what is read, what is refused, what the page makes of them."""

import json
import shutil
from base64 import b64decode
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tests.report.test_report import data_of
from tokenward import cli
from tokenward.errors import UserError
from tokenward.report.collect import RunFolder
from tokenward.report.given import read_spans
from tokenward.report.page import make_report
from tokenward.report.pairs import PairReader, draw
from tokenward.types import Span

RUN = Path("runs/quickstart")


@pytest.fixture
def reader(tiny_oracle: Path) -> PairReader:
    found = PairReader.open(RunFolder.read(RUN))
    assert found is not None
    return found


def unpacked(text: str) -> np.ndarray:
    return np.frombuffer(b64decode(text), "<f4")


def written(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_response_is_named_by_its_texts_or_by_its_key(reader: PairReader, tmp_path: Path) -> None:
    (one, _), (other, _), *_ = reader.places()
    first, second = reader.pair(one), reader.pair(other)
    text = second.comparison.responses[1]
    file = written(
        tmp_path / "spans.jsonl",
        {"key": one.keys[0], "spans": [[0, 2, 1.0], [3, 4, -1]]},
        {"prompt": second.comparison.prompt[0]["content"], "response": text, "spans": []},
        {"prompt": "never asked", "response": "never said", "spans": [[0, 9999, 1]]},
    )
    given = read_spans(file, reader)
    assert given.spans == {one.keys[0]: (Span(0, 2, 1.0), Span(3, 4, -1.0)), other.keys[1]: ()}
    assert (given.name, given.unmatched) == ("spans.jsonl", 1)
    assert first.comparison.responses[0][:2]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"key": "KEY"}, "spans: missing"),
        ({"key": "KEY", "spans": 3}, "spans: found the number 3, expected a list"),
        ({"key": "KEY", "spans": [[0, 1]]}, r"spans\[0\]: found a list of 2"),
        ({"key": "KEY", "spans": [[2, 2, 1]]}, r"spans\[0\]: found characters 2 to 2"),
        ({"key": "KEY", "spans": [[0, 4000, 1]]}, "the response's length"),
        ({"key": "KEY", "spans": [[0, 1, "x"]]}, "expected a finite number"),
        ({"key": "KEY", "prompt": "x", "spans": []}, "write the key, or the two texts"),
        ({"prompt": "x", "spans": []}, "response: missing"),
        ({"key": "KEY", "span": []}, "span: is not known; a line has key, prompt, response, spans"),
    ],
)
def test_a_wrong_line_is_named(reader: PairReader, tmp_path: Path, line: dict, said: str) -> None:
    key = next(reader.places())[0].keys[0]
    fine = {"prompt": "x", "response": "y", "spans": []}
    wrong = {name: key if value == "KEY" else value for name, value in line.items()}
    with pytest.raises(UserError, match=rf"spans\.jsonl:2: {said}|spans\.jsonl:2: .*{said}"):
        read_spans(written(tmp_path / "spans.jsonl", fine, wrong), reader)


def test_a_file_of_nothing_of_the_run_and_a_response_twice_are_refused(
    reader: PairReader, tmp_path: Path
) -> None:
    other = {"prompt": "x", "response": "y", "spans": []}
    with pytest.raises(UserError, match="none of its 1 lines names a response"):
        read_spans(written(tmp_path / "a.jsonl", other), reader)
    with pytest.raises(UserError, match=r"b\.jsonl:2: the same response as in .*b\.jsonl:1"):
        read_spans(written(tmp_path / "b.jsonl", other, other), reader)
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read"):
        read_spans(tmp_path / "none.jsonl", reader)


def test_pairs_with_given_spans_are_drawn_up_to_half_of_the_page(reader: PairReader) -> None:
    keys = {place.keys[0] for place, _ in list(reader.places())[:6]}
    drawn = draw(reader, 8, sample=5, wanted=keys)
    asked = [p for p, why in zip(drawn.places, drawn.reasons, strict=True) if "spans" in why]
    assert len(asked) == 4
    assert len(drawn.places) == 8
    assert all(place.keys[0] in keys for place in asked)


def test_given_spans_take_the_place_of_the_datas_own(copied_run: Path, tmp_path: Path) -> None:
    reader = PairReader.open(RunFolder.read(RUN))
    assert reader is not None
    place = next(reader.places())[0]
    text = reader.pair(place).comparison.responses[0]
    file = written(
        tmp_path / "marks.jsonl",
        {"key": place.keys[0], "spans": [[len(text) - 3, len(text), -2.0]]},
        {"prompt": "x", "response": "y", "spans": []},
    )
    result = CliRunner().invoke(cli.app, ["report", str(RUN), "--spans", str(file)])
    assert result.exit_code == 0, result.output
    html = (RUN / "report" / "index.html").read_text()
    assert "spans of <code>marks.jsonl</code>, 1 responses; 1 of its lines name no response" in html
    known = {
        (pair["number"], side): unpacked(response["values"]["known"])
        for pair in data_of(html)["comparisons"]
        for side, response in enumerate(pair["responses"])
    }
    assert [name for name, values in known.items() if values.any()] == [(place.number, 0)]
    assert set(known[place.number, 0]) == {0.0, -2.0}
    # The page's figures are of these spans, the evaluation's of the data's own.
    plain = make_report(RUN).html
    assert "n = 1)" in html
    assert "n = 1)" not in plain
    assert "with spans of the file" in html
    assert "with spans of the file" not in plain


def test_spans_need_scores(copied_run: Path, tmp_path: Path) -> None:
    shutil.rmtree(RUN / "scores")
    with pytest.raises(UserError, match="has no pairs with scores to compare"):
        make_report(RUN, spans=written(tmp_path / "a.jsonl", {"key": "x", "spans": []}))


def test_a_score_that_is_missing_somewhere_is_left_out_of_the_figures(
    copied_run: Path, tmp_path: Path
) -> None:
    """A further run that lacks one of the responses cannot be judged by them."""
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
