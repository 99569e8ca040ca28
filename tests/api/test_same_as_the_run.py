"""The library gives what the run of a recipe gives, to the bit."""

from pathlib import Path

import torch
from safetensors.torch import load_file

import tokenward
from tests.api.conftest import TOKENS, Script, arguments
from tokenward.evaluation.statistics import load_figures
from tokenward.scoring.store import TokenStore


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    differ = [name for name in first if not torch.equal(first[name], second[name])]
    assert not differ


def test_oracle_scores_policy_and_figures(script: Script, finished_run: Path, tmp_path: Path) -> None:
    run = finished_run / "runs" / "quickstart"
    assert_same(script.folder / "oracle" / "model", run / "oracle" / "model")

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
    assert_same(tmp_path / "policy", run / "policy" / "model")

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
    assert figures.keys() == wanted.keys()
    assert {name: repr(figure) for name, figure in figures.items()} == {
        name: repr(figure) for name, figure in wanted.items()
    }


def test_scores_and_weights_that_were_made_before_train_the_same_policy(
    script: Script, finished_run: Path, tmp_path: Path
) -> None:
    rows = [*script.train, *script.eval]
    scored = tokenward.score(rows, oracle=script.oracle, tokens=TOKENS, pairs="best_worst", quiet=True)
    chosen = tokenward.select(scored).select(range(len(script.train)))
    assert sum(weight for side in chosen[0]["token_weights"] for weight in side) > 0
    for name, given in (
        ("scores", {"train_dataset": script.train, "oracle": scored}),
        ("columns", {"train_dataset": scored.select(range(len(script.train)))}),
        ("weights", {"train_dataset": chosen}),
        ("store", {"train_dataset": script.train, "oracle": finished_run / "runs/quickstart/scores"}),
        ("stage", {"train_dataset": script.train, "oracle": finished_run / "runs/quickstart/oracle"}),
    ):
        trainer = tokenward.SelectiveTrainer(
            script.model, arguments(tmp_path / name, 4), **given, eval_dataset=script.eval, tokens=TOKENS
        )
        trainer.train()
        trainer.save_model(str(tmp_path / name))
        assert_same(tmp_path / name, finished_run / "runs" / "quickstart" / "policy" / "model")
