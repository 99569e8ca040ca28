"""The command line: help, options, and the messages of mistakes."""

import json
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import typer
import typer.main
from typer.testing import CliRunner

import tokenward
from tests.tiny import planted_rows
from tokenward import cli
from tokenward.cli.app import GOES_ON, stoppable
from tokenward.config import load_recipe
from tokenward.errors import StoppedBySignal, UserError
from tokenward.methods import all_methods, method_of
from tokenward.tools import run as tools
from tokenward.training.fit import Interrupted


def message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a mistake: exit status 2 and no traceback."""
    monkeypatch.setattr(sys, "argv", ["tokenward", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    assert stop.value.code == 2, captured
    assert "Traceback" not in captured.err + captured.out
    return captured.err


def output(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


COMMANDS = {
    "run": {"--set"},
    "data": {"--set", "--show"},
    "oracle": {"--set"},
    "reward": {"--set"},
    "score": {"--set", "--output", "--reference", "--part"},
    "train": {"--set"},
    "evaluate": {"--set"},
    "compare-models": {"--set", "--prompts", "--metric", "--reward", "--judge", "--export", "--output"},
    "config": {"--set", "--resolved"},
    "check": set(),
    "report": {"--plugins", "--rows", "--also", "--spans", "--watch", "--port"},
    "show": {"--row", "--png", "--curves", "--figures", "--light", "--term"},
    "plan": {
        "--set",
        "--step",
        "--processes",
        "--devices",
        "--device-memory",
        "--device-rate",
        "--engine",
        "--link",
    },
    "compare": {"--show", "--json"},
    "chat": {"--start"},
    "export": set(),
    "methods": set(),
    "init": set(),
}


def test_commands_and_options_are_frozen() -> None:
    """A new or a removed option is a decision: change this table with it."""
    commands = typer.main.get_command(cli.app).commands.items()  # type: ignore[attr-defined]
    found = {
        name: {option for item in command.params for option in item.opts if option.startswith("--")}
        for name, command in commands
    }
    assert {name: options - {"--help"} for name, options in found.items()} == COMMANDS
    for name in COMMANDS:
        assert "Usage" in output(name, "--help")
    assert "Find the tokens that carry a preference" in output("--help")
    assert output("--version") == f"tokenward {tokenward.__version__}\n"


def test_help_and_config_do_not_import_torch() -> None:
    code = (
        "import sys\nfrom tokenward import cli\nimport tokenward.config\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_mistake_in_a_real_process_prints_one_message(tiny_workplace: Path) -> None:
    command = [sys.executable, "-m", "tokenward", "run", "recipes/quickstrat.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Did you mean recipes/quickstart.yaml?" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_the_key_of_an_error_is_printed_below_its_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise UserError("max_length is 0.", code="out-of-range", key="tokens.max_length")

    monkeypatch.setattr(cli, "app", refuse)
    assert message(monkeypatch, capsys) == "error: max_length is 0.\nrecipe key: tokens.max_length\n"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("oracle.fractoin=0.5", ["fractoin", "fraction"]),
        ("oracle.fraction=2", ["oracle.fraction", "2"]),
        ("model.name=runs/nothing/here", ["no model folder", "runs/nothing/here"]),
        ("model.name=recipes", ["not a model folder", "quickstart.yaml"]),
        ("data.source=pears.jsonl", ["pears.jsonl", "pairs.jsonl"]),
        ("data.format=piars", ["piars", "pairs"]),
        ("data.columns={prompt: instruction}", ["instruction"]),
        ("policy.objective={name: sepoo}", ["sepoo", "sepo"]),
        ("policy.objective={name: sepo, gama: 1.0}", ["gama", "gamma"]),
        ("policy.objective={name: sepo, gamma: -1.0}", ["gamma", "-1"]),
        ("policy.selection={name: top_fraction, chosen: {fraction: 0}}", ["fraction", "(0, 1]"]),
        ("policy.selection={name: top_fraction, scope: respons}", ["scope", "respons", "response"]),
        ("scores.scorer={name: 'nowhere:Late'}", ["nowhere", "current folder"]),
        ("evaluation.metrics=[vaderr]", ["vaderr", "vader"]),
        ("oracle.training={learning_rte: 1.0}", ["learning_rte", "learning_rate"]),
        ("oracle.training={output_dir: x}", ["output_dir"]),
        ("oracle.training={lr_scheduler_type: liner}", ["oracle.training", "liner"]),
        ("tokens.max_response_tokens=1", ["response too long"]),
        ("tokens={max_response_tokens: 2, too_long: error}", ["pairs.jsonl:1", "max_response_tokens"]),
        ("data.min_gap=99", ["min_gap"]),
        ("model.device=gpu9", ["model.device", "gpu9"]),
    ],
)
def test_messages_name_the_wrong_value(
    tiny_workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    override: str,
    words: list[str],
) -> None:
    error = message(monkeypatch, capsys, "oracle", str(tiny_workplace), "--set", override)
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
def test_messages_name_the_file_and_line_of_bad_data(
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


def test_a_model_without_a_chat_template_is_refused(
    tiny_workplace: Path,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(tiny_folder, plain)
    (plain / "chat_template.jinja").unlink()
    error = message(monkeypatch, capsys, "data", str(tiny_workplace), "--set", f"model.name={plain}")
    assert "no chat template" in error


def test_data_shows_counts_and_rows(tiny_workplace: Path) -> None:
    rows = [*planted_rows(12), planted_rows(1)[0] | {"prompt": ""}]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = output("data", str(tiny_workplace), "--show", "1")
    for words in ("empty prompt", "<|im_start|>assistant", "chosen:", "no weights yet"):
        assert words in shown


def test_config_shows_values_with_their_origin(tiny_workplace: Path) -> None:
    shown = output("config", str(tiny_workplace), "--set", "seed=7", "--resolved")
    for line in (
        "seed: 7  (--set)",
        "oracle.fraction: 1.0  (default)",
        "policy.selection.eos: both  (default)",
        "policy.selection.seed: 7  (default)",
        "policy.training.tokens_per_forward: 4096  (default)",
        "reward.training.lr_scheduler_type: constant  (default)",
    ):
        assert line in shown.splitlines()
    assert "policy.selection.eos" not in output("config", str(tiny_workplace))


RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_can_be_resolved(path: Path) -> None:
    found = {item.key: item for item in tools.completely_resolved(load_recipe(path))}
    written = {item.key for item in found.values() if item.origin.startswith(str(path))}
    assert written
    if "online.source.name" in found:
        assert "online.training.max_grad_norm" in found


@pytest.mark.parametrize("name", all_methods())
def test_every_recipe_that_init_writes_can_be_resolved(name: str, tmp_path: Path) -> None:
    """Before its user has filled in anything."""
    path = tmp_path / f"{name}.yaml"
    path.write_text(method_of(name).recipe)
    keys = {line.partition(":")[0] for line in output("config", str(path), "--resolved").splitlines()}
    assert {"policy.objective.name", "policy.training.tokens_per_forward", "scores.scorer.name"} <= keys


def test_score_of_texts(tiny_oracle: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    texts, file = tmp_path / "texts.jsonl", tmp_path / "scores.jsonl"
    texts.write_text(json.dumps({"prompt": "Say.", "response": "a good cup"}) + "\n")
    assert "total" in output("score", str(tiny_oracle), str(texts))
    output("score", str(tiny_oracle), str(texts), "--output", str(file))
    record = json.loads(file.read_text())
    assert record["total"] == pytest.approx(sum(token["score"] for token in record["tokens"]))
    assert "".join(token["text"] for token in record["tokens"]) == "a good cup"
    error = message(monkeypatch, capsys, "score", "recipes/quickstart.yaml", "--output", str(file))
    assert "--output" in error


def test_score_of_a_policy_uses_the_template_of_its_run(
    tiny_workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = ["tokens.template=plain", "scores.scorer={name: random}", "policy.training.max_steps=1"]
    run = tokenward.run(tiny_workplace, changes, last="policy", quiet=True)
    Path("texts.jsonl").write_text(json.dumps({"prompt": "Say.", "response": "a good cup"}) + "\n")
    output("score", str(run.path("policy")), "texts.jsonl")
    assert tokenward.TokenScorer.load(run.path("policy")).template.kind == "plain"
    for template in run.path("policy").rglob("chat_template.jinja"):
        template.unlink()
    run.path("policy").joinpath("model").rename("bare")
    base = ["score", "bare", "texts.jsonl", "--reference", "bare"]
    assert "no chat template" in message(monkeypatch, capsys, *base)
    output(*base, "--set", "tokens.template=plain")


def test_ctrl_c_says_how_to_continue(tiny_workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stop, words, status in (
        (Interrupted("stopped at step 3 of 6"), "stopped at step 3 of 6", 130),
        (Interrupted("stopped at step 4 of 6", signal.SIGTERM), "stopped at step 4 of 6", 143),
        (KeyboardInterrupt(), GOES_ON, 130),
        (StoppedBySignal(signal=signal.SIGTERM), GOES_ON, 143),
    ):

        def stopped(*arguments: object, stop: BaseException = stop, **settings: object) -> None:
            raise stop

        monkeypatch.setattr(tools, "run_recipe", stopped)
        result = CliRunner().invoke(cli.app, ["run", str(tiny_workplace)])
        assert result.exit_code == status
        assert words in result.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_inside_a_destructor_is_not_lost(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    # A shell starts what runs in its background with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    class Closing:
        def __del__(self) -> None:
            signal.raise_signal(number)

    def works() -> None:
        with stoppable():
            closing = Closing()
            del closing
            threading.Event().wait(30)

    try:
        with pytest.raises(typer.Exit) as caught:
            works()
    finally:
        signal.signal(signal.SIGINT, before)
    assert caught.value.exit_code == 128 + number
    assert GOES_ON in capsys.readouterr().err


def test_init_does_not_overwrite_a_recipe(tmp_path: Path, monkeypatch, capsys) -> None:
    target = str(tmp_path / "new" / "mine.yaml")
    assert "tokenward run" in output("init", "tgdpo", target)
    assert "already exists" in message(monkeypatch, capsys, "init", "tgdpo", target)
