"""Scores, rewards and weights that are one number for all tokens are said, whatever the number is."""

import math

import numpy as np
import pytest

import tokenward
from tests.stages.runs import plugin
from tokenward.api.constant import constant_value

DEAD = "reward={head: {hidden: 16, bias: -1.0}, training: {max_steps: 2, per_device_train_batch_size: 4}}"


def said(recipe, capsys, *changes, last="policy") -> str:
    tokenward.run(recipe, [*changes], last=last)
    return " ".join(capsys.readouterr().out.split())


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
def test_the_only_number_of_many(parts, number):
    found = constant_value(np.array(part, np.float32) for part in parts)
    assert found == (None if number is None else pytest.approx(number, rel=1e-5))


def test_a_reward_that_tells_no_tokens_apart_is_said_where_it_is_learned_and_where_it_scores(
    tiny_workplace, capsys
):
    out = said(tiny_workplace, capsys, "scores.scorer={name: reward}", DEAD, "policy.selection={name: soft}")
    assert out.count("warning: the reward is 0.28") == 1
    assert out.count("warning: every score is 0.28") == 2, (
        "by the stage that scores, and by the one that selects"
    )
    assert "every token has weight" not in out, "once is enough"


def test_scores_that_differ_are_not_warned_of(tiny_workplace, capsys):
    alive = DEAD.replace(", bias: -1.0", ", gain: 0.5")
    out = said(tiny_workplace, capsys, "scores.scorer={name: reward}", alive, "policy.selection={name: soft}")
    assert "warning" not in out


@pytest.mark.parametrize(
    ("selection", "warned"),
    [
        ("{name: threshold, above: -1.0, below: 2.0}", True),
        ("{name: transform, steps: [{clamp: {low: 3.0, high: 3.0}}]}", True),
        ("{name: transform, steps: []}", False),
        ("{name: all}", False),
        ("{name: top_fraction, chosen: {fraction: 1.0}, rejected: {fraction: 1.0}}", False),
    ],
)
def test_one_weight_for_all_tokens_is_said_where_it_is_not_what_was_asked_for(
    tiny_workplace, capsys, selection, warned
):
    out = said(tiny_workplace, capsys, "scores.scorer={name: random}", f"policy.selection={selection}")
    assert ("warning: every token has weight" in out) is warned


def test_a_scorer_that_reads_values_and_gives_one_number_is_said_and_one_that_reads_nothing_is_not(
    tiny_workplace, capsys
):
    name = plugin(
        "import torch\n"
        "class One:\n"
        "    reads = ('reference_logp',)\n"
        "    def __call__(self, record):\n"
        "        return torch.full((len(record.ids),), 7.0)\n"
    )
    assert "warning: every score is 7," in said(
        tiny_workplace, capsys, f"scores.scorer={{name: '{name}:One'}}", last="scores"
    )
    ones = "scores.scorer={name: position, rate: 1.0}"
    assert "every score" not in said(tiny_workplace, capsys, ones, last="scores")
