"""The picture of the README, drawn from a finished run, shows the replies and the selected tokens."""

import json
from pathlib import Path
from xml.etree import ElementTree as xml

import pytest

import tokenward
from scripts.overview_picture import LONGEST, ROOT, main, result
from tokenward.artifacts import read_manifest

SVG = "{http://www.w3.org/2000/svg}"


def test_each_row_shows_both_replies_and_selected_tokens_are_framed(
    tiny_oracle: Path, tmp_path: Path
) -> None:
    first = json.loads(Path("runs/quickstart/data/eval.jsonl").read_text().splitlines()[0])
    best, _, worst = (first["responses"][first["ranks"].index(rank)] for rank in (0, 1, 2))
    prompt, output = first["prompt"][-1]["content"], tmp_path / "picture.svg"
    main(["runs/quickstart", "--output", str(output), "--prompt", prompt])

    picture = xml.parse(output).getroot()
    words = [item.text or "" for item in picture.iter(f"{SVG}text") if "textLength" in item.attrib]
    assert "".join(words) == 3 * (best + worst).replace(" ", "")
    frames = [box for box in picture.iter(f"{SVG}rect") if box.get("stroke-width") == "2"]
    scorer = tokenward.TokenScorer.load(tiny_oracle)
    counts = [len(scorer(prompt, reply).tokens) - 1 for reply in (best, worst)]  # without eos
    assert len(frames) == sum(int(0.3 * count + 1e-9) for count in counts)
    height = float(picture.attrib["height"])
    assert all(0 < float(text.attrib["y"]) < height for text in picture.iter(f"{SVG}text"))


def test_pairs_that_fit_are_listed_and_an_unknown_prompt_is_an_error(tiny_oracle: Path, capsys) -> None:
    main(["runs/quickstart", "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 * read_manifest(Path("runs/quickstart/data")).facts["eval"]
    assert max(map(len, lines)) <= LONGEST + 2
    with pytest.raises(SystemExit):
        main(["runs/quickstart", "--prompt", "Nobody asked this"])


def test_the_shipped_picture_has_the_figures_of_the_results() -> None:
    text = (ROOT / "docs" / "pictures" / "overview.svg").read_text()
    assert result("DPO, beta 0.3, all tokens (the quick start)") in text
    assert result("SePO, selected 30 %") in text
