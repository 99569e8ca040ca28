"""A mistyped model folder is answered at once, with one line, before data are read or another model is loaded."""

from pathlib import Path

import pytest

import tokenward
from tests.stages.runs import online_recipe, refusal
from tokenward.errors import UserError
from tokenward.models import identity
from tokenward.tools.chat import Conversation
from tokenward.tools.export import export
from tokenward.tools.plan import plan_recipe
from tokenward.tools.run import show_data

WRONG = "models/mymodl"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub has no such model, and nothing is loaded."""
    monkeypatch.setattr(identity, "_hub_problem", lambda name: "the hub has no model of this name")

    def load(*args, **settings):
        raise AssertionError("a model was loaded first")

    for place in ("scoring.texts.load_model", "api.inputs.load_model", "scoring.texts.load_reward_model"):
        monkeypatch.setattr(f"tokenward.{place}", load)


@pytest.fixture
def models(tiny_workplace: Path, tiny_folder: Path) -> Path:
    Path("models").mkdir()
    Path("models/mymodel").symlink_to(tiny_folder)
    Path("models/mymodle-notes").mkdir()  # more similar, but holds no model
    return tiny_workplace


@pytest.mark.parametrize(
    "change",
    [
        f"{key}={WRONG}"
        for key in (
            "model.name",
            "oracle.model",
            "policy.model",
            "reward.model",
            "auxiliary_models.good.model",
        )
    ],
)
def test_of_a_recipe(models: Path, change: str) -> None:
    error = refusal(models, [change])
    assert (error.code, error.key) == ("missing-file", change.partition("=")[0])
    assert str(error).count("\n") == 0
    assert "Did you mean 'models/mymodel'?" in str(error)


def test_of_a_source(models: Path, tiny_folder: Path) -> None:
    recipe = online_recipe(Path("online"), tiny_folder)
    error = refusal(recipe, [f"online.source={{name: classifier, model: {WRONG}}}"])
    assert (error.code, error.key) == ("missing-file", "online.source")


@pytest.mark.parametrize("begin", [tokenward.run, plan_recipe, lambda *args, quiet: show_data(*args, 1)])
def test_a_name_that_may_be_one_of_the_hub_is_looked_up_before_the_data(
    models: Path, begin, monkeypatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as caught:
        begin(models, ["model.name=modls/mymodel"], quiet=True)
    assert caught.value.key == "model.name"
    assert not Path("runs").exists()


CALLS = {
    "model": lambda args: tokenward.SelectiveTrainer(WRONG, args, []),
    "reference": lambda args: tokenward.SelectiveTrainer("models/mymodel", args, [], reference=WRONG),
    "oracle": lambda args: tokenward.SelectiveTrainer("models/mymodel", args, [], oracle=WRONG),
    "oracle ": lambda args: tokenward.score([], oracle=WRONG),
    "reference ": lambda args: tokenward.evaluate("models/mymodel", [], reference=WRONG),
    "folder": lambda args: tokenward.TokenScorer.load(WRONG),
    "reference  ": lambda args: tokenward.TokenScorer.load("models/mymodel", reference=WRONG),
    "start": lambda args: Conversation("models/mymodel", start=WRONG, display=tokenward),
    "model ": lambda args: export(WRONG, "out"),
}


@pytest.mark.parametrize("name", CALLS)
def test_of_an_argument(models: Path, name: str) -> None:
    args = tokenward.TokenTrainingArguments("out", use_cpu=True, report_to="none", disable_tqdm=True)
    with pytest.raises(UserError) as caught:
        CALLS[name](args)
    assert caught.value.code == "missing-file"
    assert str(caught.value) == (
        f"{name.strip()}: there is no folder '{WRONG}' in {Path.cwd()}, and the hub has no model of this name. Did you mean "
        "'models/mymodel'?"
    )


def test_a_name_with_a_space_is_no_traceback(models: Path) -> None:
    assert refusal(models, ["model.name=my model"]).code == "missing-file"
