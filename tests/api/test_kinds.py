"""Every kind of object that the door takes, and what it says to one that it does not take."""

import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import tokenward
from tests.api.conftest import TOKENS, Script, arguments
from tests.tiny import tiny_tokenizer
from tokenward.api.words import in_library_words
from tokenward.errors import UserError
from tokenward.models.loading import load_model
from tokenward.training.arguments import TokenTrainingArguments, token_arguments


def trained(script: Script, folder: Path, **given: Any) -> dict[str, torch.Tensor]:
    """Weights after two steps of a trainer."""
    model, args = given.pop("model", script.model), given.pop("args", arguments(folder, 2))
    rows = given.pop("train_dataset", script.train)
    trainer = tokenward.SelectiveTrainer(model, args, rows, tokens=TOKENS, **given)
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    return load_file(next((folder / "saved").glob("*model.safetensors")))


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_models_by_name_loaded_and_our_own_train_alike(script: Script, tmp_path: Path) -> None:
    by_name = trained(script, tmp_path / "name", oracle=script.oracle)
    loaded = AutoModelForCausalLM.from_pretrained(script.model)
    tokenizer = AutoTokenizer.from_pretrained(script.model)
    for name, given in {
        "loaded": {"model": loaded},
        "with_tokenizer": {
            "model": AutoModelForCausalLM.from_pretrained(script.model),
            "processing_class": tokenizer,
        },
        "own": {"model": load_model(script.model, device="cpu")},
        "path": {"model": Path(script.model)},
    }.items():
        assert_equal(trained(script, tmp_path / name, oracle=script.oracle, **given), by_name)


def test_data_sets_of_every_container_train_alike(script: Script, tmp_path: Path) -> None:
    pairs = [
        {"prompt": row["prompt"], "chosen": row["responses"][0], "rejected": row["responses"][2]}
        for row in script.train
    ]
    messages = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")},
        }
        for row in pairs
    ]
    implicit = [{side: [*row["prompt"], *row[side]] for side in ("chosen", "rejected")} for row in messages]
    plain = trained(script, tmp_path / "list", oracle=script.oracle, train_dataset=pairs)
    for name, rows in {"messages": messages, "implicit": implicit, "ranked": script.train}.items():
        for kind, given in (("list", rows), ("data set", Dataset.from_list(rows))):
            found = trained(script, tmp_path / f"{name} {kind}", oracle=script.oracle, train_dataset=given)
            assert_equal(found, plain)


def test_rows_of_one_response_train_with_an_objective_that_takes_them(script: Script, tmp_path: Path) -> None:
    rows = [
        {"prompt": row["prompt"], "completion": row["responses"][place], "label": place == 0}
        for row in script.train
        for place in (0, 2)
    ]
    found = trained(script, tmp_path, train_dataset=rows, objective=tokenward.KTO())
    start = load_file(Path(script.model) / "model.safetensors")
    assert not torch.equal(found["model.norm.weight"], start["model.norm.weight"])


class Longest:
    """Scores a token by its place: reads no model."""

    reads: ClassVar[tuple[str, ...]] = ()

    def __call__(self, record: Any) -> torch.Tensor:
        """Higher towards the end."""
        return torch.arange(len(record.ids), dtype=torch.float32)


def test_oracles_of_every_kind(script: Script, tmp_path: Path) -> None:
    held = trained(script, tmp_path / "held", oracle=script.oracle)
    folder = script.folder / "oracle" / "model"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, given in {
        "loaded": {"oracle": loaded},
        "folder": {"oracle": folder},
        "own": {"oracle": load_model(str(folder), device="cpu"), "reference": script.model},
        "scorer": {"oracle": folder, "scorer": tokenward.LogRatio(scale=3.0)},
    }.items():
        assert_equal(trained(script, tmp_path / name, **given), held)
    for name, oracle in {
        "own": Longest(),
        "surprisal": tokenward.Surprisal(),
        "spans": tokenward.Spans(),
    }.items():
        assert set(trained(script, tmp_path / f"by {name}", oracle=oracle)) == set(held)


def test_a_scorer_of_the_policy_selects_while_it_trains(script: Script, tmp_path: Path) -> None:
    online = tokenward.LogRatio(numerator="policy", denominator="reference")
    trainer = tokenward.SelectiveTrainer(
        script.model, arguments(tmp_path, 2, logging_steps=1), script.train, oracle=online, tokens=TOKENS
    )
    assert trainer.kept == {}
    trainer.train()
    assert any("selection/empty" in entry for entry in trainer.state.log_history)


def test_a_reward_is_learned_from_lists_and_scores_for_a_policy(script: Script, tmp_path: Path) -> None:
    head = tokenward.RewardSettings(hidden=None)
    reward = tokenward.train_reward(
        script.model, script.train, args=arguments(tmp_path / "reward", 2), head=head, tokens=TOKENS
    )
    scored = tokenward.score(script.eval, oracle=reward, tokens=TOKENS, quiet=True)
    assert [len(row) for row in scored["token_reward"]] == [3] * len(script.eval)
    again = tokenward.score(script.eval, oracle=tmp_path / "reward" / "model", tokens=TOKENS, quiet=True)
    assert scored["token_scores"] == again["token_scores"]
    trained(script, tmp_path, oracle=reward)


def test_an_oracle_leaves_the_given_model_as_it_was(script: Script, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(script.model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    oracle = tokenward.train_oracle(
        model, script.train, args=arguments(tmp_path / "a", 6), eval_dataset=script.eval, tokens=TOKENS
    )
    assert_equal(dict(model.state_dict()), before)
    assert_equal(
        load_file(tmp_path / "a/model/model.safetensors"),
        load_file(script.folder / "oracle/model/model.safetensors"),
    )
    scores = oracle("Say it.", "a good cup")
    trained(script, tmp_path / "b", model=model, oracle=oracle)
    # The policy was this object, and the oracle's reference is another one.
    assert oracle("Say it.", "a good cup") == scores


def test_adapters(script: Script, tmp_path: Path) -> None:
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    by_fields = trained(script, tmp_path / "fields", oracle=script.oracle, peft_config=settings)
    by_config = trained(script, tmp_path / "config", oracle=script.oracle, peft_config=LoraConfig(**settings))  # type: ignore[arg-type]
    assert_equal(by_fields, by_config)
    assert all("lora" in name for name in by_fields)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(script.model), LoraConfig(**settings))  # type: ignore[arg-type]
    trained(script, tmp_path / "given", model=model, oracle=script.oracle)
    with pytest.raises(UserError, match="has an adapter already"):
        trained(script, tmp_path, model=model, oracle=script.oracle, peft_config=settings)
    oracle = tokenward.train_oracle(
        script.model, script.train, args=arguments(tmp_path, 2), peft_config=settings, tokens=TOKENS
    )
    assert oracle("Say it.", "a good cup").total != 0


def test_objectives_that_compare_with_the_start(script: Script, tmp_path: Path) -> None:
    for objective in (tokenward.DPO(), tokenward.TDPO()):
        plain = trained(script, tmp_path / "plain", objective=objective)
        given = trained(script, tmp_path / "given", objective=objective, reference=script.model)
        assert_equal(plain, given)
        loaded = AutoModelForCausalLM.from_pretrained(script.model)
        assert_equal(trained(script, tmp_path / "loaded", objective=objective, model=loaded), plain)


def test_arguments_are_kept_and_not_changed(tmp_path: Path) -> None:
    args = arguments(tmp_path, 2, weight_decay=0.125, run_name="a name", label_names=None)
    own = token_arguments(args)
    assert isinstance(own, TokenTrainingArguments)
    same = {
        name: value
        for name, value in vars(args).items()
        if name not in ("remove_unused_columns", "_n_gpu", "dataloader_pin_memory")
    }
    assert {name: vars(own)[name] for name in same} == same
    assert (args.remove_unused_columns, own.remove_unused_columns) == (True, False)
    assert (own.tokens_per_forward, own.disable_dropout) == (4096, True)
    ours = TokenTrainingArguments(str(tmp_path), tokens_per_forward=99, use_cpu=True)
    assert token_arguments(ours).tokens_per_forward == 99


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("label_smoothing_factor", 0.1),
        ("neftune_noise_alpha", 5.0),
        ("train_sampling_strategy", "group_by_length"),
    ],
)
def test_arguments_that_cannot_act_are_refused(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"args.{field}"):
        token_arguments(TrainingArguments(str(tmp_path), use_cpu=True, **{field: value}))


def wrong(script: Script, folder: Path, **given: Any) -> str:
    with pytest.raises(UserError) as caught:
        trained(script, folder, **given)
    return str(caught.value)


def test_messages_name_arguments(script: Script, tmp_path: Path) -> None:
    """Each says what to give instead, and no recipe key or command."""
    long = tokenward.TokenSettings(max_prompt_tokens=1)
    rows = script.train
    said = [
        wrong(script, tmp_path),
        wrong(script, tmp_path, selector=tokenward.TopFraction(0.5), objective=tokenward.SimPO()),
        wrong(script, tmp_path, oracle=Dataset.from_list(rows)),
        wrong(script, tmp_path, oracle=3),
        wrong(script, tmp_path, model=3, oracle=script.oracle),
        wrong(script, tmp_path, args=3, oracle=script.oracle),
        wrong(script, tmp_path, oracle=tokenward.LogRatio()),
        wrong(script, tmp_path, oracle=script.oracle, train_dataset="pairs.jsonl"),
        wrong(
            script,
            tmp_path,
            oracle=script.oracle,
            train_dataset=[{"question": "a", "chosen": "b", "rejected": "c"}],
        ),
        wrong(script, tmp_path, oracle=script.oracle, train_dataset=[{**rows[0], "responses": "x"}]),
        wrong(script, tmp_path, oracle=script.oracle, selector=tokenward.Threshold(above=1e9)),
    ]
    with pytest.raises(UserError) as caught:
        tokenward.SelectiveTrainer(
            script.model, arguments(tmp_path, 1), rows, oracle=script.oracle, tokens=long
        )
    said.append(str(caught.value))
    for text in said:
        assert "RECIPE" not in text, text
        assert not re.search(r"\b(tokens|data|policy|model|scores|oracle|args)\.[a-z_]+:", text), text
        assert not re.search(r"\b(tokens|data|policy|scores)\.[a-z]", text), text
    for name, text in zip(
        ("oracle=", "oracle=", "tokenward.score", "oracle", "model", "args"), said, strict=False
    ):
        assert name in text


def test_a_message_without_a_recipe_key_stays_as_it_is() -> None:
    assert in_library_words("a plain text with no key") == "a plain text with no key"
    assert (
        in_library_words("Raise tokens.max_prompt_tokens.")
        == "Raise tokens=TokenSettings(max_prompt_tokens=...)."
    )


def test_a_model_without_a_tokenizer_needs_one(script: Script, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(script.model).config)
    model.config._name_or_path = ""
    assert "processing_class=" in wrong(script, tmp_path, model=model, oracle=script.oracle)
    trained(script, tmp_path, model=model, processing_class=tiny_tokenizer(), oracle=tokenward.Random())


def test_top_fraction_for_both_sides() -> None:
    both = tokenward.SideRule(fraction=0.2)
    assert tokenward.TopFraction(0.2).chosen == tokenward.TopFraction(0.2).rejected == both
    with pytest.raises(UserError, match="rule for one of them"):
        tokenward.TopFraction(0.2, chosen=tokenward.SideRule(fraction=0.4))
    with pytest.raises(UserError, match="fraction must be in"):
        tokenward.TopFraction(0.0)


def test_a_trainer_evaluates_rows_of_any_shape(script: Script, tmp_path: Path) -> None:
    trainer = tokenward.SelectiveTrainer(
        script.model, arguments(tmp_path, 1), script.train, script.eval, oracle=script.oracle, tokens=TOKENS
    )
    own, given = trainer.evaluate(), trainer.evaluate(Dataset.from_list(script.eval))
    assert own["eval_loss"] == given["eval_loss"]


def test_rows_that_cannot_be_used_have_no_scores(script: Script) -> None:
    rows = [*script.eval[:2], script.eval[0], {**script.eval[1], "responses": ["same"] * 3, "spans": None}]
    scored = tokenward.score(rows, oracle=script.oracle, tokens=TOKENS, quiet=True)
    assert [row is not None for row in scored["token_scores"]] == [True, True, False, False]
    assert tokenward.select(scored)["token_weights"][2] is None
    assert scored["prompt"] == [row["prompt"] for row in rows]


def test_a_model_that_got_an_adapter_in_one_trainer_is_looked_at_again(
    script: Script, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(script.model)
    given = {"oracle": script.oracle, "peft_config": {"r": 2, "target_modules": ["q_proj"]}}
    trained(script, tmp_path, model=model, **given)
    figures = tokenward.evaluate(
        model, script.eval, reference=script.model, bootstrap=5, tokens=TOKENS, quiet=True
    )
    # The adapter has trained inside this object, so it says something else than its start.
    assert figures["logps/chosen_change"].value != 0
