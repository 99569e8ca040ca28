"""A study trains its arms, keeps what it measured, and writes a table that says what the values say."""

import importlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes

from studies import small
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


def test_a_difference_is_of_the_same_prompts() -> None:
    found = difference(FOUND, "b", "a", "vader")
    assert found.value == pytest.approx(np.mean([-0.1, -0.1, 0.0, -0.2]))
    assert (figure(FOUND, "a", "vader").value, found.n) == (pytest.approx(0.65), 4)


def test_the_table_has_every_arm_with_each_seed_and_nothing_against_itself() -> None:
    lines = table(FOUND, against="a")
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in lines if line.startswith("| ")}
    assert list(rows) == ["arm", START, "a", "b"]
    assert rows["a"][2] == ""
    assert rows["b"][2].startswith("-0.100 [")
    assert rows["b"][3] == "0.500, 0.600"
    assert "n = 4 replies an arm" in lines[-1]
    assert "seeds 0, 1" in lines[-1]


def test_a_table_goes_between_its_markers_and_nowhere_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- study: x -->\nold\n<!-- end of study -->\n<!-- study: y -->\nkept\n<!-- end of study -->\n"
    )
    write(page, "x", ["new"])
    assert page.read_text() == (
        "before\n<!-- study: x -->\n\nnew\n\n<!-- end of study -->\n<!-- study: y -->\nkept\n<!-- end of study -->\n"
    )
    with pytest.raises(SystemExit, match="write <!-- study: z -->"):
        write(page, "z", ["new"])


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    draw(FOUND, tmp_path / "study.png", "A title")
    assert (tmp_path / "study.png").read_bytes()[:4] == b"\x89PNG"


def test_of_many_arms_each_point_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, str]] = []
    monkeypatch.setattr(Axes, "text", lambda _, kl, reward, text, **settings: drawn.append((reward, text)))
    many = [FOUND[0], *(FOUND[1]._replace(arm=f"arm {number}") for number in range(MOST_MARKED))]
    draw(many, tmp_path / "study.png", "A title")
    assert {text.strip() for _, text in drawn} >= {f"arm {number}" for number in range(MOST_MARKED)}
    heights = [height for height, text in drawn if "arm" in text]
    assert len(set(heights)) == MOST_MARKED, "arms that end alike have names that can be read"


def test_no_point_is_outside_a_picture_of_many_arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far the arms went."""
    ends: list[float] = []
    plain = Axes.set_xlim
    monkeypatch.setattr(Axes, "set_xlim", lambda axes, low, high: ends.append(high) or plain(axes, low, high))
    for kl in (0.01, 5.0, 50.0):
        far = FOUND[1]._replace(values=FOUND[1].values | {"kl": [kl] * len(FOUND[1].values["kl"])})
        many = [FOUND[0], *(far._replace(arm=f"arm {number}") for number in range(MOST_MARKED))]
        draw(many, tmp_path / "study.png", "A title")
        assert ends[-1] > kl


def test_arms_are_trained_once_and_read_again(
    tiny_workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[int] = []
    arms = [
        Arm("half", ["policy.selection.chosen.fraction=0.5"]),
        Arm("seeded", lambda seed: [f"seed={seed + 5}"], before=trained.append),
    ]
    chosen = options("").parse_args(["--seeds", "0", "--page", "page.md", "--values", "values"])
    Path("page.md").write_text("<!-- study: tiny -->\n<!-- end of study -->\n")

    found = outcomes(str(tiny_workplace), arms, chosen)
    assert [item.arm for item in found] == [START, "half", "seeded"]
    assert found[0].values["kl"] == [0.0] * len(found[0].values["kl"])
    assert all(value > 0 for value in found[1].values["kl"])
    assert found[1].facts["steps"] > 0
    assert len({len(values) for item in found[:2] for values in item.values.values()}) == 1
    assert "half, seed 0" in capsys.readouterr().out

    assert trained == [0], "what an arm is made of is trained where it is measured"

    assert outcomes(str(tiny_workplace), arms, chosen) == found
    assert trained == [0], "and not where its values are read"
    assert capsys.readouterr().out == ""
    held = peak_bytes(chosen.values, found[1])
    assert 1e6 < held < 2e9, "a tiny model's training, and not the process that it is in"
    assert "half, memory" in capsys.readouterr().out
    shutil.rmtree(found[1].changes[0].removeprefix("run="))
    assert peak_bytes(chosen.values, found[1]) == held, "it is read where it was measured"
    publish("tiny", found, chosen, against="half", title="")
    assert "| seeded |" in Path("page.md").read_text()


@pytest.mark.parametrize("study", STUDIES)
def test_each_study_has_its_place_in_the_results_and_recipes_that_load(study: str) -> None:
    module = importlib.import_module(f"studies.{study}")
    assert f"<!-- study: {study} -->" in (ROOT / "docs" / "results.md").read_text()
    recipe = getattr(module, "RECIPE", small.RECIPE)
    recipes = [recipe, *(getattr(module, name) for name in dir(module) if name.endswith("RECIPE"))]
    for path in recipes:
        load_recipe(ROOT / path)
    for arm in getattr(module, "ARMS", []):
        load_recipe(ROOT / recipe, arm.changes)
