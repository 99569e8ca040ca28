"""The kinds of objects that the library takes, and its answers to others."""

import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import tokenward
from tests.api.conftest import TOKENS, Script, arguments, assert_equal, weights
from tests.tiny import move_trained, tiny_tokenizer
from tokenward.errors import UserError
from tokenward.models.loading import load_model
from tokenward.objectives import Reinforce
from tokenward.training.arguments import TokenTrainingArguments, token_arguments

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


class Longest:
    """Scores a token by its position, and reads no model."""

    reads: ClassVar[tuple[str, ...]] = ()

    def __call__(self, record: Any) -> torch.Tensor:
        """Higher towards the end."""
        return torch.arange(len(record.ids), dtype=torch.float32)


def trainer_of(script: Script, folder: Path, **given: Any) -> tokenward.SelectiveTrainer:
    model, args = given.pop("model", script.model), given.pop("args", arguments(folder, 2))
    rows = given.pop("train_dataset", script.train)
    return tokenward.SelectiveTrainer(model, args, rows, tokens=given.pop("tokens", TOKENS), **given)


def trained(script: Script, folder: Path, **given: Any) -> dict[str, torch.Tensor]:
    """Weights after two steps of a trainer."""
    trainer = trainer_of(script, folder, **given)
    trainer.train()
    trainer.save_model(str(folder / "saved"))
    return weights(folder / "saved")


def wrong(script: Script, folder: Path, **given: Any) -> str:
    with pytest.raises(UserError) as caught:
        trainer_of(script, folder, **given)
    return caught.value.code


def test_models_in_every_form_train_alike(script: Script, tmp_path: Path) -> None:
    by_name = trained(script, tmp_path / "name", oracle=script.oracle)
    tokenizer = AutoTokenizer.from_pretrained(script.model)
    for name, given in {
        "loaded": {"model": script.load()},
        "with_tokenizer": {"model": script.load(), "processing_class": tokenizer},
        "own": {"model": load_model(script.model, device="cpu")},
        "path": {"model": Path(script.model)},
    }.items():
        assert_equal(trained(script, tmp_path / name, oracle=script.oracle, **given), by_name)


def test_data_sets_in_every_form_train_alike(script: Script, tmp_path: Path) -> None:
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
    for number, rows in enumerate((messages, implicit, script.train)):
        for kind, given in (("list", rows), ("data set", Dataset.from_list(rows))):
            folder = tmp_path / f"{number} {kind}"
            assert_equal(trained(script, folder, oracle=script.oracle, train_dataset=given), plain)


def test_unpaired_rows_train_with_an_objective_that_takes_them(script: Script, tmp_path: Path) -> None:
    rows = [
        {"prompt": row["prompt"], "completion": row["responses"][place], "label": place == 0}
        for row in script.train
        for place in (0, 2)
    ]
    found = trained(script, tmp_path, train_dataset=rows, objective=tokenward.KTO())
    assert not torch.equal(found["model.norm.weight"], weights(Path(script.model))["model.norm.weight"])


def test_oracles_in_every_form(script: Script, tmp_path: Path) -> None:
    held = trained(script, tmp_path / "held", oracle=script.oracle)
    folder = script.folder / "oracle" / "model"
    for name, given in {
        "loaded": {"oracle": AutoModelForCausalLM.from_pretrained(folder)},
        "folder": {"oracle": folder},
        "own": {"oracle": load_model(str(folder), device="cpu"), "reference": script.model},
        "scorer": {"oracle": folder, "scorer": tokenward.LogRatio(scale=3.0)},
    }.items():
        assert_equal(trained(script, tmp_path / name, **given), held)
    for oracle in (Longest(), tokenward.Surprisal(), tokenward.Spans()):
        assert set(trained(script, tmp_path / type(oracle).__name__, oracle=oracle)) == set(held)


def test_a_scorer_of_the_policy_selects_during_training(script: Script, tmp_path: Path) -> None:
    online = tokenward.LogRatio(numerator="policy", denominator="reference")
    trainer = trainer_of(script, tmp_path, args=arguments(tmp_path, 2, logging_steps=1), oracle=online)
    assert trainer.kept == {}
    trainer.train()
    assert any("selection/empty" in entry for entry in trainer.state.log_history)
    with pytest.raises(UserError) as caught:
        tokenward.score(script.eval, oracle=online, reference=script.model, quiet=True)
    assert caught.value.code == "online-scorer"


def test_a_scorer_that_reads_no_model_scores_without_a_reference(script: Script) -> None:
    scored = tokenward.score(script.eval, oracle=Longest(), processing_class=tiny_tokenizer(), quiet=True)
    assert scored[0]["token_scores"][0][:3] == [0, 1, 2]
    assert not {"token_reference_logp", "token_oracle_logp"} & set(scored.column_names)
    with pytest.raises(UserError) as caught:
        tokenward.score(script.eval, oracle=tokenward.Surprisal(), quiet=True)
    assert caught.value.code == "missing-reference"


def test_a_reward_scores_for_a_policy(script: Script, tmp_path: Path) -> None:
    head, model = tokenward.RewardSettings(hidden=None), script.load()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reward = tokenward.train_reward(
        model, script.train, args=arguments(tmp_path / "reward", 2), head=head, tokens=TOKENS
    )
    assert_equal(dict(model.state_dict()), before)
    scored = tokenward.score(script.eval, oracle=reward, tokens=TOKENS, quiet=True)
    assert [len(row) for row in scored["token_reward"]] == [3] * len(script.eval)
    again = tokenward.score(script.eval, oracle=tmp_path / "reward" / "model", tokens=TOKENS, quiet=True)
    assert scored["token_scores"] == again["token_scores"]
    trained(script, tmp_path, oracle=reward)


def test_a_reward_needs_whole_weights(script: Script, tmp_path: Path) -> None:
    adapted = get_peft_model(script.load(), LoraConfig(**LORA))  # type: ignore[arg-type]
    with pytest.raises(UserError) as caught:
        tokenward.train_reward(adapted, script.train, args=arguments(tmp_path, 1), tokens=TOKENS)
    assert caught.value.code == "not-whole-weights"


def test_an_oracle_leaves_the_given_model_as_it_was(script: Script, tmp_path: Path) -> None:
    model = script.load()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    oracle = tokenward.train_oracle(
        model, script.train, args=arguments(tmp_path / "a", 6), eval_dataset=script.eval, tokens=TOKENS
    )
    assert_equal(dict(model.state_dict()), before)
    assert_equal(weights(tmp_path / "a/model"), weights(script.folder / "oracle/model"))
    scores = oracle("Say it.", "a good cup")
    trained(script, tmp_path / "b", model=model, oracle=oracle)
    # The policy was this object, and the oracle's reference is another one.
    assert oracle("Say it.", "a good cup") == scores


TEXTS = [("Say it.", "a good cup"), ("How was it?", "bad tea, the end")]


@pytest.mark.parametrize("loaded", [False, True])
def test_an_oracle_and_a_reward_are_loaded_from_their_folder_alone(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    model, plain = (script.load() if loaded else script.model), tokenward.TokenSettings(template="plain")
    trained_here = {
        "oracle": tokenward.train_oracle(
            model, script.train, args=arguments(Path("oracle"), 2), tokens=plain, packing="none"
        ),
        "adapted": tokenward.train_oracle(
            model, script.train, args=arguments(Path("adapted"), 2), tokens=plain, peft_config=LORA
        ),
        "reward": tokenward.train_reward(
            model,
            script.train,
            args=arguments(Path("reward"), 2),
            tokens=plain,
            head=tokenward.RewardSettings(hidden=8, gain=0.5),
        ),
    }
    monkeypatch.chdir(tmp_path.parent)  # the reference may have been named from another folder
    for name, scorer in trained_here.items():
        for folder in (tmp_path / name, tmp_path / name / "model"):
            # Another session does not know the attention that this library has registered in this one.
            assert '"attention": "sdpa"' in (tmp_path / name / "model" / "token_scorer.json").read_text()
            again = tokenward.TokenScorer.load(folder)
            assert again.score_all(TEXTS) == scorer.score_all(TEXTS)
    by_object, by_folder, by_model = (
        tokenward.score(script.eval, oracle=oracle, tokens=plain, quiet=True)["token_scores"]
        for oracle in (trained_here["oracle"], str(tmp_path / "oracle"), tmp_path / "oracle" / "model")
    )
    assert by_object == by_folder == by_model


def test_a_reference_with_other_weights_is_refused(script: Script, tmp_path: Path) -> None:
    """The weights of a model that was trained in place are not those of the folder that its name says."""
    model = script.load()
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    oracle = tokenward.train_oracle(
        model, script.train, args=arguments(tmp_path / "oracle", 2), tokens=TOKENS
    )
    refused: list[Any] = [
        lambda: tokenward.TokenScorer.load(tmp_path / "oracle"),
        lambda: tokenward.TokenScorer.load(tmp_path / "oracle", reference=script.model),
        lambda: trainer_of(script, tmp_path, oracle=tmp_path / "oracle" / "model"),
    ]
    for call in refused:
        with pytest.raises(UserError) as caught:
            call()
        assert caught.value.code == "changed-reference"
    given = tokenward.TokenScorer.load(tmp_path / "oracle", reference=model)
    assert given.score_all(TEXTS) == oracle.score_all(TEXTS)
    model.config._name_or_path = ""
    args = arguments(tmp_path / "nameless", 2)
    tokenward.train_oracle(model, script.train, args=args, processing_class=tiny_tokenizer(), tokens=TOKENS)
    with pytest.raises(UserError) as caught:
        tokenward.TokenScorer.load(tmp_path / "nameless")
    assert caught.value.code == "missing-reference"


@pytest.mark.parametrize("train", [tokenward.train_oracle, tokenward.train_reward])
def test_a_named_checkpoint_must_be_the_newest(script: Script, tmp_path: Path, train: Any) -> None:
    for name, code in (("checkpoint-99", "missing-file"), ("checkpoint-1", "unusable-checkpoint")):
        for step in (1, 2):
            (tmp_path / f"checkpoint-{step}").mkdir(exist_ok=True)
        args = arguments(tmp_path, 2, resume_from_checkpoint=str(tmp_path / name))
        with pytest.raises(UserError) as caught:
            train(script.model, script.train, args=args, tokens=TOKENS)
        assert caught.value.code == code


def test_adapters(script: Script, tmp_path: Path) -> None:
    by_fields = trained(script, tmp_path / "fields", oracle=script.oracle, peft_config=LORA)
    config: Any = LoraConfig(**LORA)  # type: ignore[arg-type]
    assert_equal(by_fields, trained(script, tmp_path / "config", oracle=script.oracle, peft_config=config))
    assert all("lora" in name for name in by_fields)
    model = get_peft_model(script.load(), config)
    trained(script, tmp_path / "given", model=model, oracle=script.oracle)
    assert wrong(script, tmp_path, model=model, oracle=script.oracle, peft_config=LORA) == "second-adapter"
    oracle = tokenward.train_oracle(
        script.model, script.train, args=arguments(tmp_path, 2), peft_config=LORA, tokens=TOKENS
    )
    assert oracle("Say it.", "a good cup").total != 0


@pytest.mark.parametrize("objective", [tokenward.DPO(), tokenward.TDPO()])
def test_objectives_that_compare_with_the_start(script: Script, tmp_path: Path, objective: Any) -> None:
    plain = trained(script, tmp_path / "plain", objective=objective)
    for name, given in {"given": {"reference": script.model}, "loaded": {"model": script.load()}}.items():
        assert_equal(trained(script, tmp_path / name, objective=objective, **given), plain)


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
    with pytest.raises(UserError, match=field):
        token_arguments(TrainingArguments(str(tmp_path), use_cpu=True, **{field: value}))


@pytest.mark.parametrize(
    ("code", "given"),
    [
        ("missing-oracle", {}),
        ("missing-oracle", {"selector": tokenward.TopFraction(0.5), "objective": tokenward.SimPO()}),
        ("own-replies", {"objective": Reinforce()}),
        ("missing-scores", {"oracle": Dataset.from_list([{"chosen": "b", "rejected": "c"}])}),
        ("wrong-type", {"oracle": 3}),
        ("wrong-type", {"oracle": Longest(), "model": 3}),
        ("wrong-type", {"oracle": Longest(), "train_dataset": "pairs.jsonl"}),
        ("wrong-type", {"oracle": Longest(), "peft_config": PeftConfig()}),
        ("nothing-selected", {"oracle": Longest(), "selector": tokenward.Threshold(above=1e9)}),
    ],
)
def test_wrong_arguments_are_refused(
    script: Script, tmp_path: Path, code: str, given: dict[str, Any]
) -> None:
    with pytest.raises(UserError) as caught:
        trainer_of(script, tmp_path, **given)
    assert caught.value.code == code
    assert not re.search(
        r"RECIPE|\b(tokens|data|policy|model|scores|oracle|args)\.[a-z_]+:", str(caught.value)
    )


def test_messages_of_the_parts_name_settings(script: Script, tmp_path: Path) -> None:
    """No recipe key, and no command: a script has neither."""
    rows = script.train
    for given in (
        {"args": 3},
        {"oracle": tokenward.LogRatio()},
        {"train_dataset": [{"question": "a", "chosen": "b", "rejected": "c"}]},
        {"train_dataset": [{**rows[0], "responses": "x"}]},
        {"tokens": tokenward.TokenSettings(max_prompt_tokens=1)},
    ):
        with pytest.raises(UserError) as caught:
            trainer_of(script, tmp_path, **{"oracle": script.oracle, **given})
        text = str(caught.value)
        assert not re.search(r"RECIPE|tokenward \w+ |\b(tokens|data|policy|scores)\.[a-z]", text), text


def test_a_model_without_a_tokenizer_needs_one(script: Script, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(script.load().config)
    model.config._name_or_path = ""
    assert wrong(script, tmp_path, model=model, oracle=script.oracle) == "missing-tokenizer"
    trained(script, tmp_path, model=model, processing_class=tiny_tokenizer(), oracle=tokenward.Random())


def test_models_without_a_tokenizer_take_the_one_at_hand(script: Script, tmp_path: Path) -> None:
    """A loaded oracle, and a loaded reference, read the tokens of the model that is trained."""

    def nameless(*, moved: bool) -> Any:
        model = script.load()
        model.config._name_or_path = ""
        if moved:
            move_trained(model, by=0.1)
        return model

    oracle = nameless(moved=True)
    named = tmp_path / "oracle"
    oracle.save_pretrained(named)
    tiny_tokenizer().save_pretrained(named)
    oracle.config._name_or_path = ""
    for of_oracle, of_folder in (
        ({"oracle": oracle}, {"oracle": str(named)}),
        ({"reference": nameless(moved=False), "objective": tokenward.DPO()}, {"objective": tokenward.DPO()}),
    ):
        assert_equal(
            trained(script, tmp_path / "objects", **of_oracle),
            trained(script, tmp_path / "folders", **of_folder),
        )
    scored = [
        tokenward.score(script.train, oracle=one, reference=script.model, processing_class=tiny_tokenizer())
        for one in (nameless(moved=True), str(named))
    ]
    assert scored[0].to_list() == scored[1].to_list()


def test_an_oracle_of_another_style_is_refused(script: Script, tmp_path: Path, finished_run: Path) -> None:
    plain = tokenward.TokenSettings(max_prompt_tokens=128, max_response_tokens=64, template="plain")
    for oracle in (script.oracle, finished_run / "runs/quickstart/oracle"):
        assert wrong(script, tmp_path, oracle=oracle, tokens=plain) == "template-mismatch"


def test_top_fraction_for_both_sides() -> None:
    both = tokenward.SideRule(fraction=0.2)
    assert tokenward.TopFraction(0.2).chosen == tokenward.TopFraction(0.2).rejected == both
    with pytest.raises(UserError):
        tokenward.TopFraction(0.2, chosen=tokenward.SideRule(fraction=0.4))
    with pytest.raises(UserError):
        tokenward.TopFraction(0.0)


def test_eval_rows_whose_prompt_is_trained_on_are_dropped_and_counted(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*script.eval, {**script.train[0], "responses": ["a", "b", "c"], "spans": None}]
    args = arguments(tmp_path, 1, disable_tqdm=False)
    trainer = trainer_of(script, tmp_path, args=args, eval_dataset=rows, oracle=script.oracle)
    assert len(trainer.eval_dataset) == len(script.eval)  # type: ignore[arg-type]
    assert "eval_dataset: 7 of 8 kept; prompt also in the training rows: 1" in capsys.readouterr().out
    table = trainer.train_dataset
    again = trainer_of(script, tmp_path, train_dataset=table, eval_dataset=table, oracle=script.oracle)
    assert again.eval_dataset is None


def test_scores_that_are_all_equal_are_warned_of(
    script: Script, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    untrained = script.load()
    for disable_tqdm in (False, True):
        args = arguments(tmp_path, 1, disable_tqdm=disable_tqdm)
        trainer_of(script, tmp_path, args=args, oracle=untrained)
        assert "every score is 0," in caplog.text
        caplog.clear()
    trainer_of(script, tmp_path, oracle=script.oracle)
    assert not caplog.text


def test_a_trainer_evaluates_rows_in_any_form(script: Script, tmp_path: Path) -> None:
    trainer = trainer_of(script, tmp_path, eval_dataset=script.eval, oracle=script.oracle)
    own, given = trainer.evaluate(), trainer.evaluate(Dataset.from_list(script.eval))
    assert own["eval_loss"] == given["eval_loss"]


def test_rows_that_cannot_be_used_have_no_scores(script: Script) -> None:
    rows = [*script.eval[:2], script.eval[0], {**script.eval[1], "responses": ["same"] * 3, "spans": None}]
    scored = tokenward.score(rows, oracle=script.oracle, tokens=TOKENS, quiet=True)
    assert [row is not None for row in scored["token_scores"]] == [True, True, False, False]
    assert tokenward.select(scored)["token_weights"][2] is None
    assert scored["prompt"] == [row["prompt"] for row in rows]


def test_a_model_that_got_an_adapter_in_a_trainer_is_probed_again(script: Script, tmp_path: Path) -> None:
    model = script.load()
    trained(script, tmp_path, model=model, oracle=script.oracle, peft_config=LORA)
    figures = tokenward.evaluate(
        model, script.eval, reference=script.model, bootstrap=5, tokens=TOKENS, quiet=True
    )
    # The adapter was trained inside this object, so the model differs from its start.
    assert figures["logps/chosen_change"].value != 0
