"""Finished models in use: a chat through a pipe, a checked export, scores of custom texts."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tokenward
from tokenward import cli
from tokenward.errors import UserError
from tokenward.models.loading import load_model
from tokenward.tools import export as exporting
from tokenward.tools.finished import finished_model
from tokenward.tools.score_texts import score_file

RUN = "runs/quickstart"


def test_chat_through_a_pipe(copied_run: Path) -> None:
    lines = (
        "Say.\n/set max_new_tokens=3\n/retry\n/before\n/foo\n/set top_p=7\n/set top_k=a\n/set x=1\n/set\n/save chat.jsonl\n"
        "/undo\n/undo\n/save no/where.jsonl\n"
    )
    found = CliRunner().invoke(cli.app, ["chat", RUN], input=lines)
    assert found.exit_code == 0, found.output
    for words in (
        "before",
        "no command /foo",
        "top_p must be in (0, 1], got 7",
        "top_k must be a whole number",
        "no setting 'x'",
        "max_new_tokens=3  seed=1",
        "removed: Say.",
        "there is no reply yet",
        "no folder no",
    ):
        assert words in found.output
    saved = json.loads(Path("chat.jsonl").read_text())["messages"]
    assert [message["role"] for message in saved] == ["user", "assistant"]


def test_an_adapter_is_merged_and_gives_the_same(tiny_workplace: Path) -> None:
    change = "model.adapter={r: 2, target_modules: [q_proj, v_proj]}"
    changes = [change, "policy.training.learning_rate=0.05", "scores.scorer={name: random}"]
    run = tokenward.run(tiny_workplace, changes, last="policy", quiet=True)
    found = exporting.export(str(run.folder), "out")
    assert found.merged
    assert found.difference < found.tolerance
    assert not load_model("out").has_adapter
    card = Path("out/README.md").read_text()
    for words in (
        "License: not stated",
        "gamma: 2.0",
        "fingerprint of source",
        "apply_chat_template",
    ):
        assert words in card
    with pytest.raises(UserError) as error:
        exporting.export(str(run.folder), "out")
    assert error.value.code == "file-exists"


def test_an_export_that_differs_is_refused(copied_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "TOLERANCE", {"float32": -1.0})
    with pytest.raises(UserError) as error:
        exporting.export(RUN, "out")
    assert error.value.code == "export-differs"
    assert not Path("out").exists()


def test_only_a_finished_model_of_a_run_is_exported(copied_run: Path, tiny_folder: Path) -> None:
    assert "preference/accuracy" in exporting.model_card(finished_model(RUN), "m", merged=False)
    for target, code in ((f"{RUN}/scores", "not-a-model"), (str(tiny_folder), "not-a-run")):
        with pytest.raises(UserError) as error:
            exporting.export(target, "out")
        assert error.value.code == code


@pytest.mark.parametrize(
    ("rows", "overrides", "code"),
    [
        ([{"prompt": "Say.", "reply": "a"}], (), "missing-column"),
        ([{"prompt": "Say.", "response": 3}], (), "bad-row"),
        ([], (), "no-rows"),
        ([{"prompt": "Say.", "response": "a"}], ("seed=1",), "unused-key"),
    ],
)
def test_texts_that_cannot_be_scored_are_refused(
    tiny_oracle: Path, tmp_path: Path, rows: list[dict], overrides: tuple[str, ...], code: str
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError) as error:
        score_file(tiny_oracle, texts, overrides=overrides)
    assert error.value.code == code
    assert not rows or code == "unused-key" or "texts.jsonl:1" in str(error.value)


def test_weights_are_shown_after_scoring(copied_run: Path) -> None:
    shown = CliRunner().invoke(cli.app, ["data", str(copied_run), "--show", "3"]).output
    assert shown.count("3 rows as the model sees them; tokens in [brackets] are trained") == 1
    assert shown.count("chosen: ") == 3
    assert shown.count("brackets") == 1
    assert "weights from the scores" in shown
