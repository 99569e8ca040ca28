import sys

import pytest

from tokenward.errors import UserError
from tokenward.plugins import build

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


def test_a_function_has_no_settings():
    with pytest.raises(
        UserError, match=r"source own_lab:score is a function, .* no settings; got words"
    ) as caught:
        build("source", "own_lab:score", {"words": 3}, {})
    assert "prompts" not in str(caught.value)


def test_a_function_that_makes_the_object_takes_them():
    assert build("source", "own_lab:made", {"offset": 2.0}, {})(["a"]) == [2.0]


def test_what_cannot_be_called_is_refused():
    with pytest.raises(UserError, match="source 'own_lab:numbers' is a list, which cannot be called"):
        build("source", "own_lab:numbers", {}, {})
