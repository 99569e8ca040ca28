"""Files of strangers: reading a run or a recipe imports no code that it names, and only code written for it is run."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import tokenward
from tokenward.artifacts import MANIFEST, Manifest
from tokenward.cli import app
from tokenward.errors import UserError
from tokenward.plugins import build, find, without_plugins
from tokenward.scoring.scorers import SCORERS

RUN = Path("runs/quickstart")

# Importing this leaves a trace, and so does calling it.
CODE = """
from pathlib import Path
Path("imported").touch()
import torch
class Mine:
    def __call__(self, record):
        return torch.zeros(len(record.ids))
"""


@pytest.fixture
def strangers_run(copied_run: Path) -> Iterator[Path]:
    """A run folder whose manifests name code in the current folder, and are otherwise sound."""
    Path("stranger_code.py").write_text(CODE)
    path = RUN / "policy" / MANIFEST
    found = Manifest.model_validate_json(path.read_bytes())
    settings = json.loads(json.dumps(found.settings))
    settings["scores"]["scorer"] = {"name": "stranger_code:Mine"}
    settings["policy"]["selection"] = {"name": "stranger_code:Mine"}
    made = Manifest.begin("policy", settings, found.inputs, found.format)
    made.finished(found.facts, found.files).write(RUN / "policy")
    yield RUN
    assert not Path("imported").exists()


@pytest.mark.parametrize("command", ["report", "show", "check", "compare", "export"])
def test_a_command_that_reads_imports_nothing(strangers_run: Path, command: str) -> None:
    more = {"compare": [str(RUN)], "export": ["exported"]}.get(command, [])
    result = CliRunner().invoke(app, [command, str(RUN), *more])
    assert not Path("imported").exists(), result.output
    if command == "show":
        assert "--plugins" in result.output


def test_the_report_in_a_script_imports_nothing(strangers_run: Path) -> None:
    assert "The recipe names code of its own" in tokenward.make_report(RUN).html


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("os:system", {"command": "touch imported"}),
        ("os:system", {}),
        ("subprocess:getoutput", {"cmd": "touch imported"}),
        ("subprocess:Popen", {"args": ["touch", "imported"]}),
        ("builtins:exec", {}),
        ("numpy:array", {}),  # written in C, so that its module's name is found elsewhere
        ("torch._C:_jit_init", {}),
        ("torch:load", {"f": "weights.bin"}),
        ("torch.hub:load", {"repo_or_dir": "x", "model": "y"}),
        ("datasets:load_dataset", {"path": "x"}),
        ("tokenward.tools.export:export", {"target": "x", "folder": "y"}),
    ],
)
def test_a_recipe_cannot_call_just_any_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, settings: dict[str, object]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        build("scorer", name, settings, SCORERS)
    assert caught.value.code == "not-a-plugin"
    assert not Path("imported").exists()


def test_code_is_named_before_it_is_imported(
    tiny_workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("named_code.py").write_text(CODE.replace("imported", "seen"))
    tokenward.open_run(tiny_workplace, ["scores.scorer={name: 'named_code:Mine'}"])
    assert Path("seen").exists()
    said = " ".join(capsys.readouterr().out.split())
    assert f"named_code:Mine is code that runs with this recipe: {Path('named_code.py').absolute()}" in said


def test_no_plugins_refuses_them(tiny_workplace: Path) -> None:
    Path("refused_code.py").write_text(CODE)
    recipe = yaml.safe_load(tiny_workplace.read_text())
    recipe.setdefault("scores", {})["scorer"] = {"name": "refused_code:Mine"}
    tiny_workplace.write_text(yaml.safe_dump(recipe))
    result = CliRunner().invoke(app, ["--no-plugins", "data", str(tiny_workplace)])
    assert isinstance(result.exception, UserError)
    assert result.exception.code == "plugins-refused"
    assert not Path("imported").exists()
    assert CliRunner().invoke(app, ["config", str(tiny_workplace), "--resolved"]).exit_code == 0
    assert not Path("imported").exists()


def test_the_context_ends() -> None:
    with without_plugins("of a test"), pytest.raises(UserError, match="of a test"):
        find("scorer", "anything:at_all", SCORERS)
    with pytest.raises(UserError, match="cannot be imported"):
        find("scorer", "anything:at_all", SCORERS)
