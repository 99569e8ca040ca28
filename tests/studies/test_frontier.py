"""The instrument of the study of reward against KL: its samples, its divergence, its limit and its curves."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from studies.frontier import CONFIRMING, LOOKED_AT
from studies.frontier.arms import ARMS
from studies.frontier.curves import at
from studies.frontier.measure import divergence, logps_of, of_tokens, sampled
from studies.frontier.runs import recipe_of
from studies.frontier.world import World, best_of_kl, dense, order_weights, vader
from tests.tiny import tiny_llama
from tokenward.tools.run import open_run

BANNED = [0, 1, 2]


@pytest.mark.parametrize("best", [1, 2, 3, 6])
def test_the_limit_is_the_expected_largest_of_n(best: int) -> None:
    rewards = np.array([-0.5, 0.1, 0.2, 0.2, 0.7, 0.9])
    every = [max(found) for found in combinations(rewards, best)]
    assert float(rewards @ order_weights(len(rewards), best)) == pytest.approx(np.mean(every), abs=1e-12)


def test_the_limit_begins_at_the_start() -> None:
    assert best_of_kl(1) == 0
    assert best_of_kl(4) == pytest.approx(np.log(4) - 0.75)


def test_a_curve_is_read_where_it_first_reaches_a_distance() -> None:
    kl, reward = np.array([[0.0, 1.0, 9.0, 2.0]]), np.array([[0.2, 0.4, 0.8, 0.1]])
    assert at(kl, reward, 4.0).tolist() == pytest.approx([0.6])  # the roots are 1, 2 and 3
    assert at(kl, reward, 0.25).tolist() == pytest.approx([0.3])
    assert np.isnan(at(kl, reward, 9.5)).all()


def test_replies_are_drawn_from_what_is_allowed_and_repeat() -> None:
    torch.manual_seed(0)
    model, prompts = tiny_llama().eval(), torch.tensor([[5, 6], [7, 8], [5, 6]])
    one = sampled(model, prompts, 6, BANNED, seed=(1, 2), keep=True)
    again = sampled(model, prompts, 6, BANNED, seed=(1, 2))
    other = sampled(model, prompts, 6, BANNED, seed=(1, 3))
    assert torch.equal(one.ids, again.ids)
    assert not torch.equal(one.ids, other.ids)
    assert not set(one.ids.flatten().tolist()) & set(BANNED)
    assert one.logp is not None
    whole = logps_of(model, prompts, one.ids, BANNED)  # without the cache of sampling
    torch.testing.assert_close(one.logp, whole, atol=1e-5, rtol=0)
    assert divergence(one.logp, one.logp).tolist() == [0, 0, 0]


def test_the_divergence_is_the_expected_log_ratio() -> None:
    torch.manual_seed(0)
    policy, start = torch.randn(1, 1, 4).log_softmax(-1), torch.randn(1, 1, 4).log_softmax(-1)
    expected = sum(float(policy[0, 0, token].exp() * (policy - start)[0, 0, token]) for token in range(4))
    assert divergence(policy, start).tolist() == pytest.approx([expected], abs=1e-6)
    assert of_tokens(policy, torch.tensor([[2]])).item() == policy[0, 0, 2].item()


def test_rewards_of_words() -> None:
    assert vader("It was a good day.") > 0 > vader("It was a bad day.")
    assert dense("") == 0
    assert dense("Tea tea TEA") in (-1, 0, 1)


def test_seeds_that_confirm_were_not_looked_at() -> None:
    assert not set(LOOKED_AT) & set(CONFIRMING)


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_a_recipe(
    name: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = Path("rows.jsonl")
    rows.write_text(json.dumps({"prompt": "a", "responses": ["b", "c"], "scores": [1, 0]}) + "\n")
    world = World(str(tiny_folder), tmp_path, 0, "vader")
    recipe = recipe_of(world, ARMS[name], 1e-5, [2, 4], rows)
    for table in (recipe.get("oracle", {}), *recipe.get("auxiliary_models", {}).values()):
        if table.get("model") in ("ORACLE", "SMALLER"):
            table["model"] = str(tiny_folder)
    Path("arm.yaml").write_text(yaml.safe_dump(recipe))
    run = open_run("arm.yaml", ["run=runs/arm"], quiet=True)
    assert run.recipe.policy.training["max_steps"] == 4
