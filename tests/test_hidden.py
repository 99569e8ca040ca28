"""Secrets in settings reach no file, no output and no error, and another secret makes nothing run again."""

import copy
import pickle
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments
from typer.testing import CliRunner

from tokenward import hidden as module
from tokenward.cli import app
from tokenward.config import parse_recipe
from tokenward.config.judge import JudgeTable, load_judge
from tokenward.display import printable
from tokenward.errors import UserError
from tokenward.evaluation.judge import request_key
from tokenward.hidden import MASK, hidden, is_secret, without_secrets
from tokenward.plugins import build
from tokenward.training.arguments import token_arguments

SECRET, OTHER = "Xa7-first-secret-91", "Qb2-other-secret-55"
RUN = Path("runs/quickstart")

CODE = """
import torch
class Keyed:
    reads = ()
    def __init__(self, api_key, service=None):
        assert api_key.endswith(("91", "55"))
    def __call__(self, record):
        return torch.arange(len(record.ids), dtype=torch.float32)
"""


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_known", set())


@pytest.mark.parametrize(
    "key",
    ["api_key", "API-KEY", "openai_api_key", "hub_token", "password", "Authorization", "x.client_secret", "apikey", "aws_secret_access_key"],
)  # fmt: skip
def test_names_of_secrets(key: str) -> None:
    assert hidden({key: "abc"}) == {key: MASK}


@pytest.mark.parametrize("key", ["key_variable", "eos_token", "token", "tokens", "monkey", "max_prompt_tokens", "passwords_file", "key"])  # fmt: skip
def test_other_names(key: str) -> None:
    assert not is_secret(key, "an ordinary value")
    assert hidden({key: "an ordinary value", "n": 3}) == {key: "an ordinary value", "n": 3}


def test_shapes_of_secrets() -> None:
    found = hidden(
        {
            "token": "q1W2e3R4t5Y6u7I8o9P0",
            "headers": {"X-Mine": "abc"},
            "address": "https://me:pw77pw77@host/x?key=k1k1k1k1&n=2",
            "text": "use hf_abcdefghijklmnopqrst",
            "list": [{"password": ["a", 7, None]}],
        }
    )
    assert found == {
        "token": MASK,
        "headers": {"X-Mine": MASK},
        "address": f"https://{MASK}@host/x?key={MASK}&n=2",
        "text": f"use {MASK}",
        "list": [{"password": [MASK, MASK, None]}],
    }
    assert hidden(found) == found
    assert printable("it was pw77pw77") == f"it was {MASK}"


def test_a_word_is_not_searched_for() -> None:
    hidden({"api_key": "default", "password": "none"})
    assert printable("the default is none") == "the default is none"


def test_errors_show_no_secret() -> None:
    assert without_secrets("Authorization: Bearer abcdef1234567890") == f"Authorization: Bearer {MASK}"
    assert SECRET not in str(UserError(f"https://me:{SECRET}@host failed"))
    recipe = "model: {name: default}\n"
    for override in (
        f"model.trust_remote_code={{api_key: {SECRET}}}",
        f"policy.api_key={SECRET}",
        f"seed.password={SECRET}",
    ):
        with pytest.raises(UserError) as caught:
            parse_recipe(recipe + "seed: 1\n", "r.yaml", [override])
        assert SECRET not in str(caught.value), override


class Refusing:
    """Refuses its key and shows it."""

    def __init__(self, api_key: str) -> None:
        raise ValueError(f"bad key {api_key}")


def test_a_plugin_that_shows_its_key() -> None:
    with pytest.raises(UserError) as caught:
        build("scorer", f"{__name__}:Refusing", {"api_key": SECRET}, {})
    assert SECRET not in str(caught.value)
    assert f"bad key {MASK}" in str(caught.value)


def test_a_masked_secret_is_not_passed_on() -> None:
    with pytest.raises(UserError, match="environment variable") as caught:
        build("scorer", f"{__name__}:Refusing", hidden({"api_key": SECRET}), {})
    assert caught.value.code == "hidden-secret"


def test_pickled_training_arguments_have_no_token(tmp_path: Path) -> None:
    args = token_arguments(TrainingArguments(str(tmp_path), hub_token=SECRET, use_cpu=True, report_to="none"))
    assert args.hub_token == SECRET
    assert SECRET.encode() not in pickle.dumps(args)
    assert copy.deepcopy(args).hub_token is None


def test_a_judge(tmp_path: Path) -> None:
    path = tmp_path / "judge.yaml"
    for url in (f"http://me:{SECRET}@localhost/v1", f"http://localhost/v1?key={SECRET}"):
        path.write_text(f"url: {url}\nmodel: m\n")
        with pytest.raises(UserError, match="key_variable") as caught:
            load_judge(path)
        assert SECRET not in str(caught.value)
    path.write_text("url: http://[::1/v1\nmodel: m\n")
    with pytest.raises(UserError, match="no address"):
        load_judge(path)
    judges = [JudgeTable(url="http://x", model="m", request={"api_key": key}) for key in (SECRET, OTHER)]
    assert request_key(judges[0], []) == request_key(judges[1], [])


def test_no_command_writes_or_shows_a_secret(tiny_workplace: Path) -> None:
    Path("keyed_code.py").write_text(CODE)
    recipe = yaml.safe_load(tiny_workplace.read_text())
    service = f"https://me:{SECRET}@service.example/v1?key={SECRET}"
    recipe["scores"] = {"scorer": {"name": "keyed_code:Keyed", "api_key": SECRET, "service": service}}
    tiny_workplace.write_text(yaml.safe_dump(recipe))
    said, runs = "", str(RUN)

    def command(*words: str) -> str:
        nonlocal said
        result = CliRunner().invoke(app, list(words))
        assert result.exit_code == 0, (words, result.output, result.exception)
        said += result.output
        return result.output

    command("plan", str(tiny_workplace))
    command("run", str(tiny_workplace))
    made = {path: path.read_bytes() for path in RUN.rglob("manifest.json")}
    tiny_workplace.write_text(tiny_workplace.read_text().replace(SECRET, OTHER))
    command("run", str(tiny_workplace))
    assert {path: path.read_bytes() for path in RUN.rglob("manifest.json")} == made
    for words in (
        ["config", str(tiny_workplace)],
        ["config", str(tiny_workplace), "--resolved"],
        ["data", str(tiny_workplace), "--show", "1"],
        ["report", runs],
        ["show", runs],
        ["check", runs],
        ["compare", runs, runs],
        ["export", runs, "exported"],
    ):
        command(*words)
    assert f"scores.scorer.api_key: {MASK}" in said
    written = {
        path: path.read_bytes()
        for place in (RUN, Path("exported"))
        for path in place.rglob("*")
        if path.is_file()
    }
    for secret in (SECRET, OTHER):
        assert secret not in said
        assert not [path for path, data in written.items() if secret.encode() in data]
