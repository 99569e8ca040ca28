"""A finished model in use: a talk through a pipe, an export that is checked, settings and weights on screen."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tokenward
from tokenward import cli
from tokenward.errors import UserError
from tokenward.models.loading import load_model
from tokenward.tools import export as exporting

RUN = "runs/quickstart"


def test_chat_through_a_pipe(copied_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (
        "Say.\n/set max_new_tokens=3\n/retry\n/before\n/foo\n/set top_p=7\n/save talk.jsonl\n/undo\n/undo\n"
    )
    found = CliRunner().invoke(cli.app, ["chat", RUN], input=lines)
    assert found.exit_code == 0, found.output
    for words in ("before", "no command /foo", "top_p is 7", "taken back: Say.", "nothing was said yet"):
        assert words in found.output
    saved = json.loads(Path("talk.jsonl").read_text())["messages"]
    assert [message["role"] for message in saved] == ["user", "assistant"]


def test_an_adapter_is_merged_and_gives_the_same(tiny_workplace: Path) -> None:
    change = "model.adapter={r: 2, target_modules: [q_proj, v_proj]}"
    run = tokenward.run(tiny_workplace, [change, "policy.training.learning_rate=0.05"], quiet=True)
    found = exporting.export(str(run.folder), "out")
    assert found.merged
    assert found.difference < found.tolerance
    assert not load_model("out").has_adapter
    card = Path("out/README.md").read_text()
    for words in (
        "preference/accuracy",
        "Licence: not stated",
        "gamma: 2.0",
        "fingerprint of source",
        "apply_chat_template",
    ):
        assert words in card
    with pytest.raises(UserError, match="not empty"):
        exporting.export(str(run.folder), "out")


def test_an_export_that_differs_is_refused(copied_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "TOLERANCE", {"float32": -1.0})
    with pytest.raises(UserError, match="Nothing was written"):
        exporting.export(RUN, "out")
    assert not Path("out").exists()


def test_resolved_settings_and_weights(copied_run: Path) -> None:
    found = CliRunner().invoke(cli.app, ["config", str(copied_run), "--resolved", "--set", "seed=7"])
    assert "policy.selection.eos: both  (default)" in found.output
    assert "policy.selection.seed: 7  (default)" in found.output
    shown = CliRunner().invoke(cli.app, ["data", str(copied_run), "--show", "1"]).output
    assert "one row as the model sees it; tokens in [brackets] are trained" in shown
    three = CliRunner().invoke(cli.app, ["data", str(copied_run), "--show", "3"]).output
    assert three.count("3 rows as the model sees them; tokens in [brackets] are trained") == 1
    assert three.count("chosen: ") == 3
    assert three.count("brackets") == 1
    assert "weights by the scores" in shown
