"""One time that the reward is learned: by what settings, on what rows, and which of its weights are kept."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.trainer_utils import SchedulerType

from tests.stages.runs import events, guided, guided_recipe
from tokenward.models.reward import load_reward_model
from tokenward.stages.reward_learning import RewardLearner
from tokenward.tokens.segments import with_segments
from tokenward.training.callbacks import EarlyStop, trained_weights
from tokenward.training.trainer import TokenTrainer

ONCE = ["online.training.max_steps=1", "online.every=null"]


@pytest.fixture
def recipe(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    made = guided_recipe(tmp_path / "work", tiny_folder)
    monkeypatch.chdir(made.parent)
    return made


def test_the_reward_of_the_best_look_is_kept_and_not_the_last(recipe, monkeypatch):
    """Each look is made to seem worse than the one before, so the first one is the best."""
    plain, seen = EarlyStop.on_evaluate, []

    def worse(self, args, state, control, metrics=None, **kwargs) -> None:
        seen.append({name: weight.detach().clone() for name, weight in trained_weights(kwargs["model"])})
        plain(self, args, state, control, {**metrics, "eval_loss": float(state.global_step)}, **kwargs)

    monkeypatch.setattr(EarlyStop, "on_evaluate", worse)
    run = guided(recipe, *ONCE, "online.reward_evals=3")
    (event,) = events(run)
    assert (event["steps"], event["best_step"], len(seen)) == (3, 1, 3)
    kept = dict(load_reward_model(run.path("online") / "reward", device="cpu").model.named_parameters())
    assert all(torch.equal(kept[name], weight) for name, weight in seen[0].items())
    assert any(not torch.equal(kept[name], weight) for name, weight in seen[-1].items())


def test_the_reward_learns_one_number_per_unit(recipe, monkeypatch):
    """All tokens of a word share one reward where it is learned, as where it is used."""
    plain, learned = RewardLearner._fit, []

    def watched(self, arguments, rows, eval_rows):
        learned.append([*rows, *eval_rows])
        return plain(self, arguments, rows, eval_rows)

    monkeypatch.setattr(RewardLearner, "_fit", watched)
    token = guided(recipe, *ONCE, run="token")
    word = guided(recipe, *ONCE, "reward.head.unit=word", run="word")
    tokens, words = learned
    assert list(tokens) == [replace(row, segments=None) for row in words], "the same samples"
    tokenizer = word.tokenizer_template(word.start_model).tokenizer
    for plain_row, row in zip(tokens, words, strict=True):
        assert plain_row.segments is None
        expected = with_segments("word", tokenizer, replace(row, segments=None)).segments
        assert all(torch.equal(a, b) for a, b in zip(row.segments, expected, strict=True))
    losses = [events(run)[0]["loss"] for run in (token, word)]
    assert abs(losses[0] - losses[1]) > 1e-4


def test_reward_and_policy_train_by_the_published_settings_unless_told_otherwise(recipe, monkeypatch):
    """Of the code of TLM (arXiv 2306.00398): Adam at 5e-5, constant from the first update, gradients clipped at 5."""
    plain, used = TokenTrainer.__init__, []

    def watched(self, model, objective, arguments, rows, **kwargs):
        used.append(arguments)
        plain(self, model, objective, arguments, rows, **kwargs)

    monkeypatch.setattr(TokenTrainer, "__init__", watched)
    tables = ["reward.training={per_device_train_batch_size: 4}", "online.training={max_steps: 1}"]
    guided(recipe, *tables, "online.every=null", run="as_published")
    assert len(used) == 2
    for arguments in used:
        assert arguments.learning_rate == 5e-5
        assert arguments.lr_scheduler_type == SchedulerType.CONSTANT
        assert arguments.warmup_steps == 0
        assert arguments.max_grad_norm == 5.0
    tables = [
        f"{table}.training={{max_grad_norm: 1.0, learning_rate: 1.0e-3}}" for table in ("reward", "online")
    ]
    guided(recipe, *tables, *ONCE, run="otherwise")
    assert [(a.max_grad_norm, a.learning_rate) for a in used[2:]] == [(1.0, 1e-3)] * 2
