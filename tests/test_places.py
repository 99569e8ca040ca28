"""A recipe writes below the current folder, whatever names it gives. Its user may name another place."""

from pathlib import Path

import pytest
import yaml

import tokenward
from tokenward.config import parse_recipe
from tokenward.errors import UserError

OUTSIDE = [
    "../x",
    "a/../../b",
    "/tmp/x",
    "..",
    "runs/..",
    "~/x",
    "C:\\x",
    "\\\\host\\x",
    "..\\x",
    ".",
    "",
    ".git/hooks",
    "runs/.hidden",
]
UNUSABLE = ["runs/a\0b", "runs/a\nb", "runs/CON", "runs/aux.txt/b", "runs/" + "x" * 300, "runs/\u00e9" + "\u20ac" * 90, "runs/a.", "runs/a /b"]  # fmt: skip


def parsed(text: str, *overrides: str, name: str = "recipes/r.yaml") -> str:
    return parse_recipe(text, name, overrides).recipe.run


@pytest.mark.parametrize("place", [*OUTSIDE, *UNUSABLE])
def test_a_recipe_cannot_name_a_place_elsewhere(place: str) -> None:
    for key, table in (
        ("run", {"run": place}),
        ("sft.training.logging_dir", {"sft": {"training": {"logging_dir": place}}}),
    ):
        with pytest.raises(UserError) as caught:
            parsed(yaml.safe_dump({"seed": 1, **table}))
        assert (caught.value.code, caught.value.key) == ("unusable-place", key)


@pytest.mark.parametrize("name", ["....yaml", "x/...yaml", "recipes/nul.yaml", "a" * 200 + ".yaml"])
def test_the_name_of_the_file_is_no_way_out(name: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed("seed: 1\n", name=name)
    assert caught.value.code == "unusable-place"


@pytest.mark.parametrize(
    "place", ["runs/a", "a", "./runs/b c", "runs/2024-01-01", "runs/\u00e9t\u00e9", "runs/a:b", "runs/v1.2"]
)
def test_places_below_the_current_folder(place: str) -> None:
    assert parsed(yaml.safe_dump({"seed": 1, "run": place})) == place


@pytest.mark.parametrize("place", ["../x", "/scratch/x", "~/x"])
def test_the_user_may_name_any(place: str) -> None:
    assert parsed("seed: 1\n", f"run={place}") == place
    with pytest.raises(UserError):
        parsed("seed: 1\n", "run=/scratch/con")


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "a.b", "x" * 300, "", "a\0b"])
def test_names_of_auxiliary_models(tiny_workplace: Path, name: str) -> None:
    recipe = yaml.safe_load(tiny_workplace.read_text())
    recipe["auxiliary_models"] = {name: {"training": {"max_steps": 1}}}
    tiny_workplace.write_text(yaml.safe_dump(recipe))
    before = sorted(Path().rglob("*"))
    with pytest.raises(UserError) as caught:
        tokenward.run(tiny_workplace, quiet=True)
    assert caught.value.code == "bad-name"
    assert len(str(caught.value)) < 400
    assert sorted(Path().rglob("*")) == before
