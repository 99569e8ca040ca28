"""Settings that a script gives to the public objects and functions are checked as a recipe's are."""

import dataclasses
from itertools import chain
from typing import Literal, get_args, get_origin

import numpy as np
import pytest

import tokenward
from tokenward import (
    DPO,
    LogRatio,
    SePO,
    SideRule,
    Similarity,
    TokenSettings,
    TopFraction,
    Transform,
    UserError,
)
from tokenward.objectives.registry import OBJECTIVES
from tokenward.plugins import build
from tokenward.scoring.scorers import SCORERS
from tokenward.scoring.steps import STEPS
from tokenward.selection import SELECTORS

REQUIRED = {"domain": ("a",), "file": "a", "parts": (), "terms": [], "verifier": "a:b"}
CLASSES = set(chain(*(known.values() for known in (OBJECTIVES, SELECTORS, SCORERS, STEPS)))) | {
    SideRule, TokenSettings, tokenward.RewardSettings,
}  # fmt: skip


def choices(kind):
    """The Literal of an annotation, or None."""
    return next((item for item in (kind, *get_args(kind)) if get_origin(item) is Literal), None)


@pytest.mark.parametrize("kind", sorted(CLASSES, key=str), ids=lambda kind: kind.__name__)
def test_each_choice_of_each_class_refuses_an_unknown_value(kind):
    fields = dataclasses.fields(kind)
    required = {field.name: REQUIRED[field.name] for field in fields if field.name in REQUIRED}
    for field in fields:
        if choices(field.type):
            with pytest.raises(
                UserError, match=rf"^{kind.__name__}: {field.name} is 'unknown'. Choose "
            ) as caught:
                kind(**required, **{field.name: "unknown"})
            assert caught.value.code == "invalid-setting"


@pytest.mark.parametrize(
    ("kind", "settings", "word"),
    [
        (DPO, {"loss": "hinge"}, "loss is 'hinge'. Choose 'sigmoid' or 'ipo'"),
        (DPO, {"beta": "0.1"}, "beta is '0.1'"),
        (DPO, {"beta": True}, "beta is True"),
        (SePO, {"normaliser": "select"}, "normaliser is 'select'"),
        (SideRule, {"direction": "topp"}, "direction is 'topp'"),
        (TopFraction, {"fraction": "0.3"}, "fraction is '0.3'"),
        (TopFraction, {"chosen": 0.3}, "chosen is 0.3. It must be an instance of SideRule"),
        (TopFraction, {"eos": "chosn"}, "eos is 'chosn'"),
        (TopFraction, {"minimum": 1.5}, "minimum is 1.5"),
        (Transform, {"chosen": [3]}, "chosen.0.* is 3"),
        (Similarity, {"domain": "plus"}, "domain is 'plus'"),
        (LogRatio, {"scale": "2"}, "scale is '2'"),
        (TokenSettings, {"template": "raw"}, "template is 'raw'"),
        (TokenSettings, {"too_long": "truncat"}, "too_long is 'truncat'"),
        (tokenward.RewardSettings, {"hidden": 2.5}, "hidden is 2.5"),
        (tokenward.SamplingSettings, {"temperature": "0.7"}, "temperature is '0.7'"),
        (tokenward.TokenTrainingArguments, {"tokens_per_forward": "64"}, "tokens_per_forward is '64'"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name_and_value(kind, settings, word):
    with pytest.raises(UserError, match=rf"^{kind.__name__}: {word}") as caught:
        kind(**settings)
    assert caught.value.code == "invalid-setting"


def test_a_recipe_and_a_script_refuse_the_same_setting_alike():
    messages = []
    for make in (lambda: DPO(loss="hinge"), lambda: build("objective", "dpo", {"loss": "hinge"}, OBJECTIVES)):
        with pytest.raises(UserError) as caught:
            make()
        messages.append((caught.value.code, str(caught.value).partition(": ")[2]))
    assert messages[0] == messages[1]


def test_valid_settings_are_kept_as_given():
    assert DPO(beta=1).beta == 1
    assert type(DPO(beta=np.float32(0.5)).beta) is np.float32
    assert TopFraction(0.3, seed=np.int64(3)).seed == 3
    assert Similarity(["a", "b"]).domain == ["a", "b"]
    assert Transform(steps=["exp"], chosen=None).steps == ["exp"]


def test_a_dataclass_of_a_script_that_extends_a_setting_may_hold_anything():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(DPO):
        more: "Unknown" = None  # noqa: F821 - a name that cannot be resolved here

    assert Mine(more=object()).beta == 0.1
    with pytest.raises(UserError, match="Mine: loss"):
        Mine(loss="hinge")


CALLS = {
    "train_oracle": (("model", []), {"args": None}),
    "train_reward": (("model", []), {"args": None}),
    "SelectiveTrainer": (("model", None, []), {}),
    "score": (([],), {}),
    "evaluate": (("model", []), {"reference": "model"}),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("option", "word"),
    [
        ({"precision": "bf16"}, "precision is 'bf16'. Choose 'float32' or 'bfloat16'"),
        ({"precision": "fp16"}, "precision is 'fp16'. Choose 'float32' or 'bfloat16'"),
        ({"packing": "on"}, "packing is 'on'. Choose"),
        ({"pairs": "best"}, "pairs is 'best'. Choose"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_loaded(name, option, word):
    if name == "train_reward" and "pairs" in option:
        return
    positional, named = CALLS[name]
    with pytest.raises(UserError, match=f"^{word}") as caught:
        getattr(tokenward, name)(*positional, **named, **option)
    assert caught.value.code == "invalid-setting"


def test_a_token_scorer_refuses_a_precision():
    with pytest.raises(UserError, match="precision is 'bf16'"):
        tokenward.TokenScorer({}, tokenward.LogRatio(), precision="bf16")
