"""The library gives what the run of a recipe gives, to the bit."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import tokenward
from tests.api.conftest import TOKENS, Script, arguments, assert_equal, weights
from tokenward.evaluation.statistics import load_figures
from tokenward.scoring.store import TokenStore


def test_oracle_scores_policy_and_figures(script: Script, finished_run: Path, tmp_path: Path) -> None:
    run = finished_run / "runs" / "quickstart"
    assert_equal(weights(script.folder / "oracle/model"), weights(run / "oracle/model"))

    scored = tokenward.score(
        [*script.train, *script.eval], oracle=script.oracle, tokens=TOKENS, pairs="best_worst", quiet=True
    )
    store, seen = TokenStore(run / "scores"), 0
    for row in scored:
        for place, key in enumerate(row["response_keys"]):
            for name in ("reference_logp", "oracle_logp"):
                assert row[f"token_{name}"][place] == store[key].values[name]
            seen += 1
    assert seen == len(store)

    trainer = tokenward.SelectiveTrainer(
        script.model,
        arguments(tmp_path, 4),
        script.train,
        script.eval,
        oracle=script.oracle,
        selector=tokenward.TopFraction(0.3),
        objective=tokenward.SePO(gamma=2.0),
        tokens=TOKENS,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "policy"))
    assert_equal(weights(tmp_path / "policy"), weights(run / "policy/model"))

    figures = tokenward.evaluate(
        str(tmp_path / "policy"),
        script.eval,
        reference=script.model,
        oracle=script.oracle,
        metrics=["vader"],
        prompts=4,
        sampling=tokenward.SamplingSettings(max_new_tokens=6),
        bootstrap=50,
        tokens=TOKENS,
        quiet=True,
    )
    wanted = load_figures(run / "evaluation" / "metrics.json")
    assert {name: repr(figure) for name, figure in figures.items()} == {
        name: repr(figure) for name, figure in wanted.items()
    }


def test_existing_scores_and_weights_train_the_same_policy(
    script: Script, finished_run: Path, tmp_path: Path
) -> None:
    rows, run = [*script.train, *script.eval], finished_run / "runs" / "quickstart"
    scored = tokenward.score(rows, oracle=script.oracle, tokens=TOKENS, pairs="best_worst", quiet=True)
    chosen = tokenward.select(scored).select(range(len(script.train)))
    for name, given in (
        ("scores", {"train_dataset": script.train, "oracle": scored}),
        ("columns", {"train_dataset": scored.select(range(len(script.train)))}),
        ("weights", {"train_dataset": chosen}),
        ("store", {"train_dataset": script.train, "oracle": run / "scores"}),
        ("stage", {"train_dataset": script.train, "oracle": run / "oracle"}),
    ):
        trainer = tokenward.SelectiveTrainer(
            script.model, arguments(tmp_path / name, 4), **given, eval_dataset=script.eval, tokens=TOKENS
        )
        trainer.train()
        trainer.save_model(str(tmp_path / name))
        assert_equal(weights(tmp_path / name), weights(run / "policy/model"))


@pytest.mark.parametrize("objective", ["dpo", "tdpo"])
def test_a_policy_compared_with_its_start(
    script: Script, copied_run: Path, tmp_path: Path, objective: str
) -> None:
    table = f"{{name: {objective}}}"
    tokenward.run(
        copied_run, ["policy.selection={name: all}", f"policy.objective={table}"], last="policy", quiet=True
    )
    given = {"dpo": tokenward.DPO(), "tdpo": tokenward.TDPO()}[objective]
    trainer = tokenward.SelectiveTrainer(
        script.model, arguments(tmp_path, 4), script.train, objective=given, tokens=TOKENS
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "policy"))
    assert_equal(weights(tmp_path / "policy"), weights(Path("runs/quickstart/policy/model")))


@pytest.mark.parametrize("loaded", [False, True])
def test_a_reward(script: Script, copied_run: Path, tmp_path: Path, loaded: bool) -> None:
    training = "{learning_rate: 1.0e-3, per_device_train_batch_size: 4, max_steps: 3}"
    tokenward.run(
        copied_run,
        ["scores.scorer={name: reward}", f"reward={{head: {{hidden: 16, gain: 0.5}}, training: {training}}}"],
        last="reward",
        quiet=True,
    )
    model = script.load() if loaded else script.model
    head = tokenward.RewardSettings(hidden=16, gain=0.5)
    published = {"lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 5.0}
    args = arguments(tmp_path, 3, **published)
    tokenward.train_reward(model, script.train, args=args, head=head, eval_dataset=script.eval, tokens=TOKENS)
    run = Path("runs/quickstart/reward/model")
    assert_equal(weights(tmp_path / "model"), weights(run))
    head_file = "token_reward_head.safetensors"
    assert (tmp_path / "model" / head_file).read_bytes() == (run / head_file).read_bytes()


@pytest.mark.parametrize("kind", ["pairs", "prompts", "data set"])
def test_a_policy_that_trains_on_its_own_replies(
    script: Script, copied_run: Path, tmp_path: Path, kind: str
) -> None:
    """Its rewards are the oracle's log ratios, loaded or by its folder; a prompt without responses is as good as a pair's."""
    changes = [
        "policy.selection={name: all}",
        "policy.objective={name: reinforce, entropy: 0.0, return_to_go: true, baseline: leave_one_out, kl: 1.0}",
        "policy.rollouts=3",
        "policy.sampling={max_new_tokens: 5, top_k: 0}",
    ]
    tokenward.run(copied_run, changes, last="policy", quiet=True)
    prompts = [{"prompt": row["prompt"]} for row in script.train]
    given: dict[str, Any] = {
        "pairs": {"train_dataset": script.train, "rewards": script.oracle},
        "prompts": {"train_dataset": prompts, "rewards": Path("runs/quickstart/oracle")},
        "data set": {"train_dataset": Dataset.from_list(prompts), "rewards": script.oracle},
    }[kind]
    trainer = tokenward.ReinforceTrainer(
        script.model,
        arguments(tmp_path, 4),
        **given,
        rollouts=3,
        sampling=tokenward.SamplingSettings(max_new_tokens=5),
        tokens=TOKENS,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "policy"))
    assert_equal(weights(tmp_path / "policy"), weights(Path("runs/quickstart/policy/model")))


def test_training_does_not_change_the_rewards_of_an_oracle_whose_reference_is_the_policy(
    script: Script, tmp_path: Path
) -> None:
    found, model = [], script.load()
    for name, policy in (("loaded", model), ("folder", script.model)):
        trainer = tokenward.ReinforceTrainer(
            policy,
            arguments(tmp_path / name, 3),
            script.train,
            rewards=tokenward.TokenScorer.load(script.folder / "oracle", reference=policy),
            rollouts=2,
            sampling=tokenward.SamplingSettings(max_new_tokens=5),
            tokens=TOKENS,
        )
        trainer.train()
        trainer.save_model(str(tmp_path / name / "model"))
        found.append(weights(tmp_path / name / "model"))
    assert_equal(*found)


@pytest.mark.parametrize(
    ("code", "given"),
    [
        ("wrong-objective", {"objective": tokenward.DPO()}),
        ("wrong-type", {"rewards": 3}),
        ("out-of-range", {"rollouts": 0}),
        (
            "conflicting-settings",
            {"rollouts": 1, "objective": tokenward.objectives.Reinforce(baseline="mean")},
        ),
        ("conflicting-settings", {"rollouts": 1}),  # the usual baseline is that of the other replies
        ("bad-row", {"train_dataset": [{"prompt": ""}]}),
        ("no-rows", {"sampling": tokenward.SamplingSettings(max_new_tokens=100_000)}),
    ],
)
def test_what_cannot_train_on_own_replies_is_refused(
    script: Script, tmp_path: Path, code: str, given: dict[str, Any]
) -> None:
    usual = {"train_dataset": script.train, "rewards": script.oracle}
    with pytest.raises(tokenward.UserError) as caught:
        tokenward.ReinforceTrainer(script.model, arguments(tmp_path, 1), **{**usual, **given}, tokens=TOKENS)
    assert caught.value.code == code
