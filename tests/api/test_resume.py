"""A script's training goes on from its newest whole checkpoint."""

import logging
from pathlib import Path
from typing import Any

import pytest

import tokenward
from tests.api.conftest import TOKENS, Script, arguments, assert_equal, weights
from tokenward.errors import UserError

EVERY: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}


def trainer_of(script: Script, folder: Path, steps: int = 3) -> tokenward.SelectiveTrainer:
    args = arguments(folder, steps, **EVERY)
    return tokenward.SelectiveTrainer(script.model, args, script.train, oracle=script.oracle, tokens=TOKENS)


def test_a_damaged_checkpoint_is_named_and_an_older_one_is_used(
    script: Script, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(script, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "whole"))
    optimizer = tmp_path / "checkpoint-3" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"checkpoint-3/optimizer\.pt has .* bytes instead of") as caught:
        trainer_of(script, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert caught.value.code == "damaged-checkpoint"
    again = trainer_of(script, tmp_path)
    with caplog.at_level(logging.WARNING, "tokenward"):
        again.train(resume_from_checkpoint=True)
    assert "It is now damaged-checkpoint-3" in caplog.text
    again.save_model(str(tmp_path / "again"))
    assert_equal(weights(tmp_path / "again"), weights(tmp_path / "whole"))


def test_without_a_whole_checkpoint_it_begins_again(script: Script, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No valid checkpoint"):
        trainer_of(script, tmp_path, 1).train(resume_from_checkpoint=True)
    trainer_of(script, tmp_path, 1).train()
    (tmp_path / "checkpoint-1" / "model.safetensors").unlink()
    again = trainer_of(script, tmp_path, 1)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "damaged-checkpoint-1"]


def test_a_damaged_best_checkpoint_is_not_loaded(script: Script, tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    args = arguments(tmp_path, 2, **EVERY, **best)
    rows = script.eval
    trainer = tokenward.SelectiveTrainer(
        script.model, args, script.train, rows, oracle=script.oracle, tokens=TOKENS
    )
    trainer.train()
    weights_file = Path(str(trainer.state.best_model_checkpoint)) / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes() + b" ")
    with pytest.raises(UserError) as caught:
        trainer._load_best_model()
    assert caught.value.code == "damaged-checkpoint"


@pytest.mark.parametrize("other", ["rows", "order", "weights", "objective", "SePO.gamma 2.0 and not 1.0"])
def test_a_checkpoint_of_another_training_is_refused(script: Script, tmp_path: Path, other: str) -> None:
    """It would be the other training's result under this one's name."""
    trainer_of(script, tmp_path, 1).train()
    swapped = [{**row, "scores": [-score for score in row["scores"]]} for row in script.train]
    rows = {"rows": swapped, "order": script.train[::-1]}.get(other, script.train)
    more: dict[str, Any] = {
        "weights": {"selector": tokenward.TopFraction(0.5)},
        "objective": {"objective": tokenward.DPO()},
        "SePO.gamma 2.0 and not 1.0": {"objective": tokenward.SePO(gamma=1.0)},
    }.get(other, {})
    args = arguments(tmp_path, 2, **EVERY)
    again = tokenward.SelectiveTrainer(script.model, args, rows, oracle=script.oracle, tokens=TOKENS, **more)
    with pytest.raises(UserError, match="checkpoint-1 is of another training") as caught:
        again.train(resume_from_checkpoint=True)
    assert caught.value.code == "unusable-checkpoint"
    assert other in str(caught.value)


def test_a_checkpoint_of_another_reference_is_refused(script: Script, tmp_path: Path) -> None:
    """A script that loads the checkpoint as its model would compare the policy with itself."""

    def trained(model: Any, steps: int, *, resume: bool = False, **more: Any) -> None:
        args = arguments(tmp_path, steps, **EVERY, learning_rate=0.1, warmup_steps=0)
        trainer = tokenward.SelectiveTrainer(
            model, args, script.train, objective=tokenward.DPO(), tokens=TOKENS, **more
        )
        trainer.train(resume_from_checkpoint=resume or None)

    trained(script.load(), 1)
    newest = str(tmp_path / "checkpoint-1")
    with pytest.raises(UserError, match=r"log-probability per token -.* and not -.*another model") as caught:
        trained(newest, 2, resume=True)
    assert caught.value.code == "unusable-checkpoint"
    trained(script.load(), 2, resume=True)


def test_an_oracle_is_not_resumed_from_that_of_other_rows(script: Script, tmp_path: Path) -> None:
    def train(rows: Any, **more: Any) -> None:
        args = arguments(tmp_path, 1, **EVERY, **more)
        tokenward.train_oracle(script.model, rows, args=args, tokens=TOKENS)

    train(script.train)
    swapped = [{**row, "scores": [-score for score in row["scores"]]} for row in script.train]
    with pytest.raises(UserError, match="other rows"):
        train(swapped, resume_from_checkpoint=True)
    train(script.train, resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "other", ["", "rollouts 2 and not 3", "sampling.temperature", "rewards.oracle_logp", "reference"]
)
def test_own_replies_go_on_with_the_same_samples_and_rewards(
    script: Script, tmp_path: Path, other: str
) -> None:
    def trained(steps: int, *, resume: bool = False, **more: Any) -> None:
        given = {"rewards": script.oracle, "rollouts": 2, "temperature": 1.0, "batch": 64, **more}
        sampling = tokenward.SamplingSettings(
            max_new_tokens=5, temperature=given.pop("temperature"), batch=given.pop("batch")
        )
        args = arguments(tmp_path, steps, **EVERY)
        trainer = tokenward.ReinforceTrainer(
            script.model, args, script.train, sampling=sampling, tokens=TOKENS, **given
        )
        trainer.train(resume_from_checkpoint=resume or None)

    trained(1)
    further = script.load()
    further.get_input_embeddings().weight.data.mul_(1.5)
    other_oracle = tokenward.TokenScorer.load(script.model, reference=script.model)
    more: dict[str, Any] = {
        "": {"batch": 2},  # how many replies are made at once may change
        "rollouts 2 and not 3": {"rollouts": 3},
        "sampling.temperature": {"temperature": 0.9},
        "rewards.oracle_logp": {"rewards": other_oracle},
        "reference": {"reference": further},
    }[other]
    if not other:
        trained(2, resume=True, **more)
        return
    with pytest.raises(UserError, match="checkpoint-1 is of another training") as caught:
        trained(2, resume=True, **more)
    assert caught.value.code == "unusable-checkpoint"
    assert other in str(caught.value)
