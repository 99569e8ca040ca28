"""The picture of the README, drawn from a finished run: it shows the replies, and the tokens that the selection keeps."""

import json
from pathlib import Path
from xml.etree import ElementTree as xml

import pytest

import tokenward
from scripts.overview_picture import LONGEST, main
from tokenward.artifacts import read_manifest

SVG = "{http://www.w3.org/2000/svg}"


def drawn(output: Path, *arguments: str) -> xml.Element:
    main(["runs/quickstart", "--output", str(output), *arguments])
    return xml.parse(output).getroot()


def words(picture: xml.Element) -> list[str]:
    return [element.text or "" for element in picture.iter(f"{SVG}text") if "textLength" in element.attrib]


def test_both_replies_stand_in_each_row_and_selected_tokens_are_framed(
    tiny_oracle: Path, tmp_path: Path
) -> None:
    first = json.loads(Path("runs/quickstart/data/eval.jsonl").read_text().splitlines()[0])
    best, _, worst = (first["responses"][first["ranks"].index(rank)] for rank in (0, 1, 2))
    prompt = first["prompt"][-1]["content"]

    picture = drawn(tmp_path / "picture.svg", "--prompt", prompt)

    letters = (best + worst).replace(" ", "")
    assert "".join(words(picture)) == 3 * letters
    frames = [box for box in picture.iter(f"{SVG}rect") if box.get("stroke-width") == "2"]
    scorer = tokenward.TokenScorer.load(tiny_oracle)
    counts = [len(scorer(prompt, reply).tokens) - 1 for reply in (best, worst)]  # the end is not counted
    assert len(frames) == sum(int(0.3 * count + 1e-9) for count in counts)
    height = float(picture.attrib["height"])
    assert all(0 < float(text.attrib["y"]) < height for text in picture.iter(f"{SVG}text"))


def test_a_prompt_that_is_not_there_is_said(tiny_oracle: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        drawn(tmp_path / "picture.svg", "--prompt", "Nobody asked this")
    assert "no held-out prompt" in capsys.readouterr().err


def test_the_list_has_pairs_that_fit(tiny_oracle: Path, capsys) -> None:
    main(["runs/quickstart", "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 * read_manifest(Path("runs/quickstart/data")).facts["eval"]
    assert max(map(len, lines)) <= LONGEST + 2


def test_the_shipped_picture_has_the_figures_of_the_results() -> None:
    from scripts.overview_picture import ROOT, result

    text = (ROOT / "docs" / "pictures" / "overview.svg").read_text()
    assert f"{result('vader/before')} → {result('vader/after')}" in text
