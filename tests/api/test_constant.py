"""Warnings when all scores, rewards or weights are one number."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tokenward
from tokenward.api.constant import constant_value, warn_of_scores, warn_of_weights
from tokenward.scoring.scorers import SCORERS
from tokenward.selection import KeepAll, SideRule, Threshold, TopFraction


@pytest.mark.parametrize(
    ("parts", "number"),
    [
        ([[0.0, 0.0], [0.0]], 0.0),
        ([[0.5, math.nan], [0.5]], 0.5),
        ([[-0.5487], [-0.54870003]], -0.5487),
        ([[0.5], [0.5001]], None),
        ([[-1e-9, 1e-9]], None),
        ([[math.nan], []], None),
        ([], None),
    ],
)
def test_constant_value(parts, number):
    found = constant_value(np.array(part, np.float32) for part in parts)
    assert found == (None if number is None else pytest.approx(number, rel=1e-5))


def test_one_score_is_reported_unless_the_scorer_reads_nothing():
    shown: list[str] = []
    ones = [np.full(3, 7.0), np.full(2, 7.0)]
    assert warn_of_scores(SCORERS["surprisal"](), ones, shown.append)
    assert "every score is 7," in shown.pop()
    assert not warn_of_scores(SCORERS["position"](rate=1.0), ones, shown.append)
    assert not warn_of_scores(SCORERS["surprisal"](), [np.arange(3.0)], shown.append)
    assert shown == []


@pytest.mark.parametrize(
    ("selector", "weights", "warned"),
    [
        (Threshold(above=-1.0, below=2.0), [1.0, 1.0], True),
        (Threshold(above=-1.0, below=2.0), [1.0, 0.0], False),
        (KeepAll(), [1.0, 1.0], False),
        (TopFraction(chosen=SideRule(fraction=1.0), rejected=SideRule(fraction=1.0)), [1.0, 1.0], False),
        (TopFraction(), [1.0, 1.0], True),
    ],
)
def test_one_weight_is_reported_unless_it_was_asked_for(selector, weights, warned):
    shown: list[str] = []
    rows: Any = SimpleNamespace(columns={"weights": SimpleNamespace(flat=np.array(weights))})
    warn_of_weights(selector, rows, shown.append)
    assert ["every token has weight 1" in line for line in shown] == [True] * warned


@pytest.mark.parametrize(("head", "reports"), [("bias: -1.0", (1, 2)), ("gain: 0.5", (0, 0))])
def test_constant_reward_is_reported_where_it_is_learned_and_where_it_scores(
    tiny_workplace, capsys, head, reports
):
    reward = (
        f"reward={{head: {{hidden: 16, {head}}}, training: {{max_steps: 2, per_device_train_batch_size: 4}}}}"
    )
    tokenward.run(
        tiny_workplace,
        ["scores.scorer={name: reward}", reward, "policy.selection={name: soft}"],
        last="policy",
    )
    out = " ".join(capsys.readouterr().out.split())
    assert (out.count("warning: the reward is 0.28"), out.count("warning: every score is 0.28")) == reports
    assert "every token has weight" not in out, "one warning is enough"
