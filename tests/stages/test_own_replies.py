"""A run on comparisons whose policy trains on its own replies, with the reward or the oracle that the run learned."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

import tokenward
from tests.stages.runs import press_when, refusal
from tokenward.api.own_replies import OwnReplies
from tokenward.scoring.reads import token_values
from tokenward.stages import policy as stage
from tokenward.stages.lists import run_through
from tokenward.stages.tables import ranked_lists
from tokenward.tools.run import open_run
from tokenward.training.fit import Interrupted

REWARD = (
    "scores.scorer={name: reward}",
    "reward={head: {hidden: 16, gain: 0.5, bound: none}, training: {max_steps: 2, learning_rate: 1.0e-3, per_device_train_batch_size: 4}}",
)
REPLIES = (
    "policy.selection={name: all}",
    "policy.objective={name: reinforce, entropy: 0.0, kl: 0.1, return_to_go: true, baseline: leave_one_out}",
    "policy.rollouts=3",
    "policy.sampling={max_new_tokens: 6, top_k: 0}",
    "policy.training={max_steps: 4, learning_rate: 1.0e-3, per_device_train_batch_size: 2, save_strategy: steps, save_steps: 1}",
)
RULES = {"precision": "float32", "tokens_per_batch": 8192}


def made_rows(recipe: Path, monkeypatch: pytest.MonkeyPatch, *changes: str):
    """The run, and the rows of its first step."""
    seen = []

    class Kept(OwnReplies):
        def __call__(self, rows, step):
            found = super().__call__(rows, step)
            seen.append((rows, found))
            return found

    monkeypatch.setattr(stage, "OwnReplies", Kept)
    run = tokenward.run(recipe, [*REPLIES, *changes], last="policy", quiet=True)
    return run, seen


def weights(run) -> dict[str, torch.Tensor]:
    return load_file(run.path("policy") / "model" / "model.safetensors")


def test_replies_of_the_policy_train_with_the_reward_that_the_run_learned(
    tiny_workplace, tiny_folder, monkeypatch
):
    run, steps = made_rows(tiny_workplace, monkeypatch, *REWARD)
    assert len(steps) == 4
    (asked, rows), start = steps[0], run.load(str(tiny_folder))
    assert all(not row.responses for row in asked)
    assert [row.prompt for row in rows] == [row.prompt for row in asked]
    assert all(len(row.responses) == 3 for row in rows)
    plain = [replace(row, scores=None, reference_logp=None) for row in rows]
    reward = run.load_reward(str(run.path("reward") / "model"))
    for row, mine, first in zip(
        rows, *(token_values(model, plain, **RULES) for model in (reward, start)), strict=True
    ):
        for scores, value, logp, at_start in zip(row.scores, mine, row.reference_logp, first, strict=True):
            assert torch.equal(scores.float(), value)
            torch.testing.assert_close(logp, at_start, rtol=0, atol=1e-5)
    before = load_file(tiny_folder / "model.safetensors")
    assert max(float((before[name] - value).abs().max()) for name, value in weights(run).items()) > 1e-4
    # Every prompt once, though the data has several pairs of it.
    prompts = [tuple(row.comparison.prompt[-1]["content"] for row in asked) for asked, _ in steps]
    assert run.done("policy").facts["steps"] == 4
    assert len({text for step in prompts for text in step}) == 8


def test_only_prompts_within_their_limit_are_replied_to_as_in_a_script(
    tiny_workplace, tiny_folder, tmp_path, monkeypatch, caplog
):
    """Replies of the data may have any length: they do not train."""
    run = open_run(str(tiny_workplace), quiet=True)
    run_through(run, "data")
    template = run.tokenizer_template(run.recipe.model.name)
    sizes = sorted(len(row.prompt) for row in ranked_lists(run, template)[0])
    assert sizes[0] < sizes[-1]
    limits = {"max_prompt_tokens": sizes[0], "max_response_tokens": 64}
    changes = [f"tokens.{name}={value}" for name, value in limits.items()]
    run, steps = made_rows(tiny_workplace, monkeypatch, *REWARD, *changes)
    asked = {row.comparison.key: row.asked for rows, _ in steps for row in rows}
    assert asked
    assert {len(ids) for ids in asked.values()} == {sizes[0]}
    dropped = sum(size > sizes[0] for size in sizes)
    kept = f"{len(sizes) - dropped} of {len(sizes)} kept; dropped: prompt too long: {dropped}"
    facts = json.loads((run.path("policy") / "manifest.json").read_text())["facts"]
    assert facts["rows"] == len(sizes) - dropped

    rows = [json.loads(line) for line in (run.path("data") / "train.jsonl").read_text().splitlines()]
    rows = [{name: row[name] for name in ("prompt", "responses", "ranks")} for row in rows]
    for given in (rows, [{"prompt": row["prompt"]} for row in rows]):
        caplog.clear()
        trainer = tokenward.ReinforceTrainer(
            str(tiny_folder),
            TrainingArguments(str(tmp_path)),
            given,
            rewards=run.path("reward"),
            sampling=tokenward.SamplingSettings(max_new_tokens=6),
            tokens=tokenward.TokenSettings(max_prompt_tokens=sizes[0], max_response_tokens=1),
        )
        assert f"train_dataset: {kept}" in caplog.text
        assert {row.comparison.key: row.asked for row in trainer.train_dataset}.items() >= asked.items()
        assert len(trainer.train_dataset) == len(sizes) - dropped


def test_the_log_ratio_of_the_oracle_is_a_reward_too(tiny_workplace, tiny_folder, monkeypatch):
    """RTO (arXiv 2404.18922): the oracle against the reference, at every token."""
    run, ((_, rows), *_) = made_rows(tiny_workplace, monkeypatch)
    plain = [replace(row, scores=None, reference_logp=None) for row in rows]
    models = (run.load(str(run.path("oracle") / "model")), run.load(str(tiny_folder)))
    for row, high, low in zip(rows, *(token_values(model, plain, **RULES) for model in models), strict=True):
        for scores, one, other in zip(row.scores, high, low, strict=True):
            torch.testing.assert_close(scores.float(), one - other, rtol=0, atol=2e-6)


def test_a_stopped_training_on_own_replies_ends_as_if_it_had_not_been(tiny_workplace, monkeypatch):
    whole = weights(tokenward.run(tiny_workplace, [*REWARD, *REPLIES], last="policy", quiet=True))
    changes = [*REWARD, *REPLIES, "run=runs/stopped"]
    with monkeypatch.context() as patch:
        press_when(patch, lambda state: (state.global_step, state.max_steps) == (2, 4))
        with pytest.raises(Interrupted):
            tokenward.run(tiny_workplace, changes, last="policy", quiet=True)
    again = weights(tokenward.run(tiny_workplace, changes, last="policy", quiet=True))
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_keys_of_own_replies_change_no_other_policy(tiny_workplace):
    """The settings of a policy that trains on the data are those that older runs have in their manifests."""
    run = tokenward.open_run(tiny_workplace, quiet=True)
    settings = stage.PolicyStage().settings(run)["policy"]
    assert settings.keys() == {"selection", "objective", "training"}


def test_a_prompt_without_room_for_a_reply_is_left_out_and_none_is_refused(tiny_workplace, capsys):
    error = refusal(tiny_workplace, [*REWARD, *REPLIES, "policy.sampling.max_new_tokens=4000"], last="policy")
    assert (error.code, error.key) == ("no-rows", "policy.sampling.max_new_tokens")


def test_a_key_without_effect_is_said(tiny_workplace, capsys):
    tokenward.run(tiny_workplace, ["policy.rollouts=3"], last="data")
    assert "policy.rollouts is not used" in capsys.readouterr().out
