"""Methods of papers as recipes: short, complete, and each trains."""

import math
import re
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import tokenward
from studies.methods import arm_of
from tests.selection.test_selectors import scored
from tests.stages.runs import lines, plugin
from tests.tiny import make_workplace
from tokenward import cli
from tokenward.config import Named, parse_recipe
from tokenward.errors import UserError
from tokenward.methods import RECOMMENDED, VERDICTS, all_methods, method_of
from tokenward.selection import selector_of
from tokenward.stages.lists import check_recipe

METHODS = all_methods()
UNKNOWN = {"LOW": "-0.5", "HIGH": "1.5"}
"""Placeholders of recipes, and values for the tests."""


def filled(text: str) -> str:
    for name, value in UNKNOWN.items():
        text = text.replace(name, value)
    verifier = plugin("def right(prompts, completions):\n    return [1.0] * len(completions)\n")
    return text.replace("my_module:is_correct", f"{verifier}:right")


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_a_method_is_at_most_ten_lines_and_says_where_it_is_from(method):
    assert len([line for line in method.body.splitlines() if line.strip()]) <= 10
    assert method.line.endswith(".")
    assert method.paper.startswith("arXiv ")
    assert method.verdict in VERDICTS
    assert set(yaml.safe_load(method.body)) <= {"auxiliary_models", "oracle", "reward", "scores", "policy"}


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_a_written_recipe_is_whole(method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loaded = parse_recipe(filled(method.recipe), f"{method.name}.yaml")
    check_recipe(loaded)
    assert loaded.recipe.run == f"runs/{method.name}"


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_a_written_recipe_shows_how_each_model_is_trained(method):
    """And nothing else but the method's body."""
    written, body = yaml.safe_load(method.recipe), yaml.safe_load(method.body)
    usual = {"learning_rate": 1e-5, "per_device_train_batch_size": 8, "num_train_epochs": 1}
    falling = {"lr_scheduler_type": "linear"}
    shown = {"oracle": usual, "policy": usual}
    shown["reward"] = {**usual, **falling, "learning_rate": 5e-5, "num_train_epochs": 3}
    if body["policy"]["objective"]["name"] == "reinforce":
        online = {"per_device_train_batch_size": 64, "max_steps": 128, **falling}
        shown["policy"] = {"learning_rate": 1e-5, **online}
    trained = [name for name in shown if name in body]
    assert trained
    for name in trained:
        body[name]["training"] = shown[name]
    assert {name: written[name] for name in body} == body
    rates = [line for line in method.recipe.splitlines() if line.startswith("    learning_rate")]
    assert len(rates) == len(trained)
    assert all("for billions of parameters" in line for line in rates)


@pytest.fixture(scope="module")
def workplace(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished workplace, in which the methods share stages."""
    return shutil.copytree(finished_run, tmp_path_factory.mktemp("methods") / "copy")


@pytest.mark.parametrize("name", [name for name in METHODS if name != "cft"])
def test_each_method_trains(name, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    changes = [*arm_of(METHODS[name]).changes, "fixed_prompts=0"]
    if name in ("rto", "tlm_rl"):
        changes += ["policy.sampling.max_new_tokens=4", "policy.training.max_steps=2"]
    run = tokenward.run("recipes/quickstart.yaml", changes, last="policy", quiet=True)
    history = lines(run.path("policy") / "history.jsonl")
    assert all(abs(entry["loss"]) < 1e3 for entry in history if "loss" in entry)
    assert run.done("policy").facts["steps"] > 0


@pytest.mark.parametrize("name", METHODS)
def test_each_method_has_its_rows_in_the_docs(name):
    docs = Path(__file__).parents[1] / "docs"
    assert any(
        f"`{name}`" in line.split("|")[3]
        for line in (docs / "papers.md").read_text().splitlines()
        if line.count("|") == 5
    )
    assert f"`{name}`" in (docs / "methods.md").read_text()


def test_placeholders_must_be_replaced(tiny_workplace):
    loaded = parse_recipe(METHODS["tis_dpo"].recipe, "tis.yaml")
    with pytest.raises(UserError, match="LOW") as caught:
        check_recipe(loaded)
    assert caught.value.code == "placeholder"


@pytest.mark.parametrize("name", [name for name in METHODS if name.startswith("tis_dpo")])
def test_tis_dpo_clamps_the_score_before_the_sign_turns(name):
    """arXiv 2410.04350, Eq. 19: w = exp(mu clamp(s, L, U)) with L = -0.5, U = 1.5, mu = 1 and -1, on both sides -3, 0, 3."""
    table = yaml.safe_load(filled(METHODS[name].body))["policy"]["selection"]
    selector = selector_of(Named(name=table.pop("name"), arguments=table), 0)
    weights = selector(scored([-3.0, 0.0, 3.0], [-3.0, 0.0, 3.0])).tolist()
    assert weights == pytest.approx([math.exp(x) for x in (-0.5, 0.0, 1.5, 0.5, 0.0, -1.5)], rel=1e-6)
    assert weights[3:] == pytest.approx([1.649, 1.0, 0.223], abs=5e-4)


def test_the_list_has_every_method_with_its_paper():
    found = CliRunner().invoke(cli.app, ["methods"]).output
    for method in METHODS.values():
        assert method.name in found
        assert method.paper in found
    assert "less than dpo" in found


@pytest.mark.parametrize("name", ["rto", "sepo"])
def test_a_recipe_says_how_it_is_carried_out_and_what_is_there_at_the_end(
    name, tmp_path, tiny_folder, monkeypatch
):
    """With the command and the places of its comments."""
    monkeypatch.chdir(make_workplace(tmp_path, tiny_folder).parent.parent)
    said = CliRunner().invoke(cli.app, ["init", name]).output
    text = Path(f"{name}.yaml").read_text()
    comments = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("#"))
    assert f"`tokenward run {name}.yaml`" in said
    assert f"tokenward run {name}.yaml ends with" in comments
    small = [
        f"model.name={tiny_folder}",
        "data.source=pairs.jsonl",
        "evaluation.prompts=2",
        "evaluation.max_new_tokens=4",
    ]
    small += ["policy.sampling.max_new_tokens=4"] if name == "rto" else []
    small += [f"{table}.training.max_steps=1" for table in ("oracle", "policy")]
    changes = [word for change in small for word in ("--set", change)]
    result = CliRunner().invoke(cli.app, ["run", f"{name}.yaml", *changes])
    assert result.exit_code == 0, result.output
    places = re.findall(r"\bruns/[\w./]+\w", comments)
    assert len(places) >= 2
    assert all(Path(place).exists() for place in places)


def test_init_without_a_name_writes_the_method_that_the_study_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(cli.app, ["init"]).exit_code == 0
    assert Path(f"{RECOMMENDED}.yaml").read_text() == METHODS[RECOMMENDED].recipe


def test_init_writes_a_recipe_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(cli.app, ["init", "tgdpo"]).exit_code == 0
    written = Path("tgdpo.yaml").read_text()
    assert written == METHODS["tgdpo"].recipe
    assert isinstance(CliRunner().invoke(cli.app, ["init", "tgdpo"]).exception, UserError)
    assert CliRunner().invoke(cli.app, ["init", "tgdpo", "deep/other.yaml"]).exit_code == 0
    with pytest.raises(UserError, match="tgdpo") as caught:
        method_of("tgdp")
    assert caught.value.code == "unknown-name"
