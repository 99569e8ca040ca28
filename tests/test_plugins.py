"""Plugins by name: what is built, and what is refused."""

import sys
from dataclasses import dataclass

import pytest

from tokenward.errors import UserError
from tokenward.plugins import build, find

LAB = """
numbers = [1, 2]
def score(prompts, completions, **columns):
    return [0.0 for text in completions]
def made(offset):
    return lambda completions: [offset for text in completions]
"""


@pytest.fixture(autouse=True)
def lab(tmp_path, monkeypatch):
    (tmp_path / "own_lab.py").write_text(LAB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("own_lab", None)


@dataclass
class Scaled:
    scale: float


KNOWN = {"scaled": Scaled}


def test_a_function_with_settings_builds_the_plugin():
    assert build("source", "own_lab:made", {"offset": 2.0}, {})(["a"]) == [2.0]
    assert build("scorer", "scaled", {"scale": 2}, KNOWN) == Scaled(2.0)


@pytest.mark.parametrize(
    ("name", "settings", "code", "word"),
    [
        ("scalde", {}, "unknown-name", "'scaled'"),
        ("own_lap:score", {}, "import-failed", "own_lap"),
        ("own_lab:scores", {}, "import-failed", "'scores'"),
        ("own_lab:numbers", {}, "not-callable", "a list"),
        ("own_lab:score", {"words": 3}, "unknown-setting", "words"),
        ("scaled", {"scael": 3}, "unknown-setting", "'scale'"),
        ("scaled", {}, "missing-setting", "scale"),
        ("scaled", {"scale": "much"}, "invalid-setting", "'much'"),
        ("scaled", {"scale": "4"}, "invalid-setting", "'4'"),
        ("scaled", {"scale": "HIGH"}, "placeholder", "HIGH"),
    ],
)
def test_names_and_settings_that_do_not_exist_are_refused(name, settings, code, word):
    with pytest.raises(UserError, match=word) as caught:
        build("scorer", name, settings, KNOWN)
    assert caught.value.code == code


@pytest.mark.parametrize("name", ["..:x", ":", ":x", "x:", "a..b:x", "a b:c", "a:b.c", "../a:b"])
def test_what_cannot_be_a_name_is_refused_before_it_is_imported(name):
    with pytest.raises(UserError, match=r"is not the name of a class or function|there is no") as caught:
        find("scorer", name, {"one": object})
    assert caught.value.code == "unknown-name"


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "1 / 0", "def f(:"])
def test_a_module_that_cannot_be_imported_is_named(tmp_path, monkeypatch, code):
    name = f"broken_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=name) as caught:
        find("scorer", f"{name}:Mine", {})
    assert caught.value.code == "import-failed"
