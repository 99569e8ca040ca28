"""The command line: help, flags, and what a user's mistake costs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.tiny import planted_rows
from tokenward import cli
from tokenward.cli.app import GOES_ON


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tokenward.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a mistake prints, in this process: exit status 2, and no traceback."""
    monkeypatch.setattr(sys, "argv", ["tokenward", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    assert stop.value.code == 2, captured
    assert "Traceback" not in captured.err + captured.out
    return captured.err


VERBS = {
    "run": {"--set"},
    "data": {"--set", "--show"},
    "oracle": {"--set"},
    "reward": {"--set"},
    "score": {"--set", "--output", "--reference"},
    "train": {"--set"},
    "evaluate": {"--set"},
    "compare-models": {"--set", "--prompts", "--metric", "--reward", "--judge", "--export", "--output"},
    "config": {"--set", "--resolved"},
    "report": {"--rows", "--also", "--spans"},
    "show": {"--row", "--png", "--curves", "--light", "--term"},
    "plan": {"--set", "--step"},
    "compare": {"--show", "--json"},
    "chat": {"--start"},
    "export": set(),
    "methods": set(),
    "init": set(),
}


def test_verbs_and_flags_are_frozen() -> None:
    """A flag that comes or goes is a decision: change this table with it."""
    import typer.main

    found = {
        name: {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
        - {"--help"}
        for name, command in typer.main.get_command(cli.app).commands.items()  # type: ignore[attr-defined]
    }
    assert found == VERBS


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_reads_well(verb: str) -> None:
    result = CliRunner().invoke(cli.app, [*([verb] if verb else []), "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output
    if verb:
        assert verb in result.output


def test_version_is_that_of_the_package() -> None:
    import tokenward

    result = CliRunner().invoke(cli.app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"tokenward {tokenward.__version__}\n")
    assert "Find the tokens that carry a preference" in CliRunner().invoke(cli.app, ["--help"]).output


def test_help_and_config_wait_for_no_torch() -> None:
    code = (
        "import sys\nfrom tokenward import cli\nimport tokenward.config\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_mistake_costs_one_message_and_status_2_in_a_real_process(tiny_workplace: Path) -> None:
    done = call("run", "recipes/quickstrat.yaml")
    assert done.returncode == 2
    assert "Did you mean recipes/quickstart.yaml?" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["oracle.fractoin=0.5"], ["fractoin", "fraction"]),
        (["oracle.fraction=2"], ["oracle.fraction", "2"]),
        (["model.name=runs/nothing/here"], ["no model folder", "runs/nothing/here"]),
        (["model.name=recipes"], ["not a model folder", "quickstart.yaml"]),
        (["data.source=pears.jsonl"], ["pears.jsonl", "pairs.jsonl"]),
        (["data.format=piars"], ["piars", "pairs"]),
        (["data.columns={prompt: instruction}"], ["instruction"]),
        (["policy.objective={name: sepoo}"], ["sepoo", "sepo"]),
        (["policy.objective={name: sepo, gama: 1.0}"], ["gama", "gamma"]),
        (["policy.objective={name: sepo, gamma: -1.0}"], ["gamma", "-1"]),
        (["policy.selection={name: top_fraction, chosen: {fraction: 0}}"], ["fraction", "(0, 1]"]),
        (["policy.selection={name: top_fraction, scope: respons}"], ["scope", "respons", "response"]),
        (["scores.scorer={name: 'nowhere:Late'}"], ["nowhere", "current folder"]),
        (["evaluation.metrics=[vaderr]"], ["vaderr", "vader"]),
        (["oracle.training={learning_rte: 1.0}"], ["learning_rte", "learning_rate"]),
        (["oracle.training={output_dir: x}"], ["output_dir"]),
        (["oracle.training={lr_scheduler_type: liner}"], ["oracle.training", "liner"]),
        (["tokens.max_response_tokens=1"], ["no comparison is left", "response too long"]),
        (["tokens={max_response_tokens: 2, too_long: error}"], ["pairs.jsonl:1", "max_response_tokens"]),
        (["data.min_gap=99"], ["min_gap"]),
        (["model.device=gpu9"], ["model.device", "gpu9"]),
    ],
    ids=lambda value: value[0][:50] if isinstance(value, list) else "",
)
def test_wrong_values_name_what_to_write(
    tiny_workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    words: list[str],
) -> None:
    arguments = [part for override in overrides for part in ("--set", override)]
    error = message(monkeypatch, capsys, "oracle", str(tiny_workplace), *arguments)
    for word in words:
        assert word in error, error


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"prompt": "a", "chosen": "b", "rejected": "c"}', '{"prompt": '], ["pairs.jsonl:2"]),
        (['{"prompt": "a", "chosen": "b"}'], ["chosen", "rejected"]),
        (['{"prompt": "a", "chosen": "b", "rejected": null}'], ["pairs.jsonl:1", "rejected"]),
        (['{"question": "a", "answer": "b"}'], ["question, answer"]),
        (['{"prompt": "a", "chosen": "b", "rejected": "b"}'], ["identical responses"]),
        ([""], ["pairs.jsonl"]),
    ],
)
def test_bad_data_is_named_with_file_and_line(
    tiny_workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lines: list[str],
    words: list[str],
) -> None:
    Path("pairs.jsonl").write_text("\n".join(lines) + "\n")
    error = message(monkeypatch, capsys, "data", str(tiny_workplace))
    for word in words:
        assert word in error, error


def test_a_model_without_chat_template_says_what_to_write(
    tiny_workplace: Path,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import shutil

    plain = tmp_path / "plain"
    shutil.copytree(tiny_folder, plain)
    (plain / "chat_template.jinja").unlink()
    error = message(monkeypatch, capsys, "data", str(tiny_workplace), "--set", f"model.name={plain}")
    assert "no chat template" in error
    assert "template: plain" in error


def test_data_shows_counts_and_rows(
    tiny_workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*planted_rows(12), planted_rows(1)[0] | {"prompt": ""}]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["tokenward", "data", str(tiny_workplace), "--show", "1"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "empty prompt" in shown
    assert "<|im_start|>assistant" in shown
    assert "chosen:" in shown


def test_config_prints_values_with_their_origin(tiny_workplace: Path) -> None:
    result = CliRunner().invoke(cli.app, ["config", str(tiny_workplace), "--set", "seed=7"])
    assert "seed: 7  (--set)" in result.output
    assert "oracle.fraction: 1.0  (default)" in result.output


def test_score_shows_tokens_of_own_text(tiny_oracle: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"prompt": "Say.", "response": "a good cup"}) + "\n")
    result = CliRunner().invoke(cli.app, ["score", str(tiny_oracle), str(texts)])
    assert result.exit_code == 0, result.output
    assert "total" in result.output
    output = tmp_path / "scores.jsonl"
    CliRunner().invoke(cli.app, ["score", str(tiny_oracle), str(texts), "--output", str(output)])
    record = json.loads(output.read_text())
    assert record["total"] == pytest.approx(sum(token["score"] for token in record["tokens"]))
    assert "".join(token["text"] for token in record["tokens"]) == "a good cup"


def test_score_of_a_policy_writes_prompts_as_its_run_did(
    tiny_workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import tokenward

    changes = ["tokens.template=plain", "scores.scorer={name: random}", "policy.training.max_steps=1"]
    run = tokenward.run(tiny_workplace, changes, last="policy", quiet=True)
    Path("texts.jsonl").write_text(json.dumps({"prompt": "Say.", "response": "a good cup"}) + "\n")
    base = ["score", str(run.path("policy")), "texts.jsonl"]
    assert CliRunner().invoke(cli.app, base).exit_code == 0
    assert tokenward.TokenScorer.load(run.path("policy")).template.kind == "plain"
    for template in run.path("policy").rglob("chat_template.jinja"):
        template.unlink()
    bare = Path("bare")
    run.path("policy").joinpath("model").rename(bare)
    base = ["score", str(bare), "texts.jsonl", "--reference", str(bare)]
    assert "template: plain" in message(monkeypatch, capsys, *base)
    assert CliRunner().invoke(cli.app, [*base, "--set", "tokens.template=plain"]).exit_code == 0
    error = message(monkeypatch, capsys, *base, "--set", "seed=1")
    assert "--set seed: texts of your own" in error


def test_score_of_a_row_without_response_names_the_row(
    tiny_oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"prompt": "Say.", "reply": "a"}\n')
    error = message(monkeypatch, capsys, "score", str(tiny_oracle), str(texts))
    assert "texts.jsonl:1" in error
    assert "prompt, reply" in error


def test_ctrl_c_says_that_the_same_command_goes_on(
    tiny_workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenward.tools import run as command
    from tokenward.training.fit import Interrupted

    def stopped(*arguments: object, **settings: object) -> None:
        raise Interrupted("stopped at step 3 of 6; the same command goes on from there")

    monkeypatch.setattr(command, "run_recipe", stopped)
    result = CliRunner().invoke(cli.app, ["run", str(tiny_workplace)])
    assert result.exit_code == 130
    assert "stopped at step 3 of 6; the same command goes on from there" in result.output

    def at_once(*arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_recipe", at_once)
    result = CliRunner().invoke(cli.app, ["run", str(tiny_workplace)])
    assert result.exit_code == 130
    assert GOES_ON in result.output
