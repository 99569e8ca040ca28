"""A study trains its arms once, stores what it measured, and makes its table from the stored values."""

import importlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes

from studies import arms, small
from studies.arms import START, Arm, Outcome, options, outcomes
from studies.peak import peak_bytes
from studies.tables import MOST_MARKED, difference, draw, figure, publish, table, write
from tokenward.config import load_recipe

ROOT = Path(__file__).parents[2]
STUDIES = ["selection", "rates", "oracle_data", "weak_to_strong", "out_of_domain", "methods"]


def outcome(arm: str, seed: int, vader: list[float], kl: float = 1.0) -> Outcome:
    others = {"kl": [kl] * len(vader), "length": [5.0] * len(vader), "ended": [1.0] * len(vader)}
    return Outcome(arm, seed, {"vader": vader, **others}, {})


FOUND = [
    outcome(START, 0, [0.0, 0.2]),
    outcome("a", 0, [0.5, 0.7]),
    outcome("b", 0, [0.4, 0.6]),
    outcome(START, 1, [0.1, 0.1]),
    outcome("a", 1, [0.6, 0.8]),
    outcome("b", 1, [0.6, 0.6]),
]


def test_the_table_pairs_the_prompts_and_shows_every_seed() -> None:
    found = difference(FOUND, "b", "a", "vader")
    assert found.value == pytest.approx(np.mean([-0.1, -0.1, 0.0, -0.2]))
    assert (figure(FOUND, "a", "vader").value, found.n) == (pytest.approx(0.65), 4)
    lines = table(FOUND, against="a")
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in lines if line.startswith("| ")}
    assert list(rows) == ["arm", START, "a", "b"]
    assert rows["a"][2] == ""
    assert rows["b"][2].startswith("-0.100 [")
    assert rows["b"][3] == "0.500, 0.600"
    assert "n = 4 " in lines[-1]


def test_a_table_is_written_only_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = (
        "before\n<!-- study: x -->{}<!-- end of study -->\n<!-- study: y -->\nkept\n<!-- end of study -->\n"
    )
    page.write_text(text.format("\nold\n"))
    write(page, "x", ["new"])
    assert page.read_text() == text.format("\n\nnew\n\n")
    with pytest.raises(SystemExit, match="study: z"):
        write(page, "z", ["new"])


def test_labels_of_many_arms_do_not_overlap_and_every_point_is_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heights: dict[str, float] = {}
    ends: list[float] = []
    plain = Axes.set_xlim
    monkeypatch.setattr(Axes, "text", lambda _, kl, y, text, **settings: heights.update({text.strip(): y}))
    monkeypatch.setattr(Axes, "set_xlim", lambda axes, low, high: ends.append(high) or plain(axes, low, high))
    for kl in (0.01, 50.0):
        many = [FOUND[0], *(outcome(f"arm {number}", 0, [0.5, 0.7], kl) for number in range(MOST_MARKED))]
        draw(many, tmp_path / "study.png", "A title")
        assert ends[-1] > kl
        assert len({heights[item.arm] for item in many[1:]}) == MOST_MARKED


@pytest.mark.slow
def test_arms_are_trained_once_and_read_again(
    tiny_workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[int] = []
    both = [
        Arm("half", ["policy.selection.chosen.fraction=0.5"]),
        Arm("seeded", lambda seed: [f"seed={seed + 5}"], before=trained.append),
    ]
    chosen = options("").parse_args(
        ["--seeds", "0", "--page", "page.md", "--values", "values", "--pictures", "."]
    )
    Path("page.md").write_text("<!-- study: tiny -->\n<!-- end of study -->\n")

    found = outcomes(str(tiny_workplace), both, chosen)
    assert [item.arm for item in found] == [START, "half", "seeded"]
    assert not any(found[0].values["kl"])
    assert all(value > 0 for value in found[1].values["kl"])
    assert found[1].facts["steps"] > 0
    assert len({len(values) for item in found[:2] for values in item.values.values()}) == 1
    tiny_workplace.write_text("# a comment does not matter\n" + tiny_workplace.read_text())
    assert outcomes(str(tiny_workplace), both, chosen) == found
    assert trained == [0]

    peak = peak_bytes(chosen.values, found[1])
    assert 1e6 < peak < 2e9, "of the training, not of the whole process"
    shutil.rmtree(found[1].changes[0].removeprefix("run="))
    assert peak_bytes(chosen.values, found[1]) == peak
    capsys.readouterr()
    publish("tiny", found, chosen, against="half", title="")
    assert "| seeded |" in Path("page.md").read_text()
    assert Path("study_tiny.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("study", STUDIES)
def test_each_study_has_valid_recipes_and_a_place_in_the_page(study: str) -> None:
    module = importlib.import_module(f"studies.{study}")
    assert f"<!-- study: {study} -->" in (ROOT / "docs" / "earlier_studies.md").read_text()
    recipe = getattr(module, "RECIPE", small.RECIPE)
    for path in (recipe, *(getattr(module, name) for name in dir(module) if name.endswith("RECIPE"))):
        load_recipe(ROOT / path)
    for arm in getattr(module, "ARMS", []):
        load_recipe(ROOT / recipe, arm.changes)


@pytest.mark.parametrize("study", ["rates", "oracle_data", "methods"])
def test_the_table_in_the_page_is_made_from_the_stored_values(
    study: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(arms, "_measured", None)  # nothing is trained
    module = importlib.import_module(f"studies.{study}")
    against = getattr(module, "AGAINST", None) or module.BASE.name
    found = small.small_outcomes(module.ARMS, options("").parse_args([]))
    assert "\n".join(table(found, against=against)) in (ROOT / "docs" / "earlier_studies.md").read_text()
