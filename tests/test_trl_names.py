"""Names of TRL are answered with ours, in recipes and in scripts, by one table that the documentation shows."""

import dataclasses
import inspect
import warnings
from itertools import accumulate

import pytest
import yaml
from transformers import TrainingArguments

import tokenward
from scripts.trl_page import PAGE, with_table
from tokenward.config import Named, parse_recipe
from tokenward.config.problems import unknown_keys
from tokenward.errors import UserError
from tokenward.objectives import objective_of
from tokenward.stages.lists import check_recipe
from tokenward.training.arguments import TokenTrainingArguments, token_arguments
from tokenward.trl_names import TABLE, trl_advice

SAME = {"self", "model", "args", "train_dataset", "eval_dataset", "callbacks", "disable_dropout"}
"""Names that mean here what they mean in TRL."""


def refused(call) -> UserError:
    with pytest.raises(UserError) as caught:
        call()
    return caught.value


def test_every_setting_and_argument_of_trl_is_in_the_table() -> None:
    trl = pytest.importorskip("trl")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.cpo import CPOConfig, CPOTrainer
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer
    kinds = [
        (trl.DPOConfig, trl.DPOTrainer), (trl.KTOConfig, trl.KTOTrainer), (trl.GRPOConfig, trl.GRPOTrainer),
        (trl.RewardConfig, trl.RewardTrainer), (trl.SFTConfig, trl.SFTTrainer), (CPOConfig, CPOTrainer), (ORPOConfig, ORPOTrainer),
    ]  # fmt: skip
    inherited = {item.name for item in dataclasses.fields(TrainingArguments)}
    for config, trainer in kinds:
        names = {item.name for item in dataclasses.fields(config)} - inherited
        names |= set(inspect.signature(trainer.__init__).parameters)
        assert sorted(name for name in names - SAME if not trl_advice(name, recipe=True)) == [], config


def test_the_table_is_whole_and_the_documentation_shows_it() -> None:
    names = [name for ours in TABLE for name in ours.names]
    assert len(set(names)) == len(names)
    assert all(ours.without or (ours.recipe and ours.script) for ours in TABLE)
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page) == page, "run python -m scripts.trl_page"
    assert "| `sync_ref_model`, " in page


@pytest.mark.parametrize("text", [ours.recipe for ours in TABLE if ": {" in ours.recipe])
def test_what_is_written_in_a_recipe_has_keys_that_exist(text: str) -> None:
    depth = list(accumulate((char == "{") - (char == "}") for char in text))
    end = next(place for place, char in enumerate(text) if char == "}" and not depth[place])
    tables = yaml.safe_load(text[: end + 1])
    inside = {"objective", "training"} & set(tables)
    assert [*unknown_keys({"policy": tables} if inside else tables)] == []


@pytest.mark.parametrize(
    ("recipe", "key", "ours"),
    [
        ("max_length: 512", "max_length", "max_prompt_tokens"),
        ("tokens: {max_completion_length: 512}", "tokens.max_completion_length", "max_response_tokens"),
        ("policy: {precompute_ref_log_probs: true}", "policy.precompute_ref_log_probs", "always computed"),
        ("model: {tokenizer: mine}", "model.tokenizer", "saved with model.name"),
        ("online: {use_vllm: true}", "online.use_vllm", "sampler"),
        ("policy: {training: {beta: 0.1}}", "policy.training.beta", "objective: {name: dpo, beta: ...}"),
        (
            "oracle: {training: {dataset_num_proc: 4}}",
            "oracle.training.dataset_num_proc",
            "tokens: {processes: ...}",
        ),
        ("policy: {training: {loss_typ: ipo}}", "policy.training.loss_typ", "loss"),
    ],
)
def test_a_recipe_with_a_name_of_trl(recipe: str, key: str, ours: str) -> None:
    error = refused(lambda: check_recipe(parse_recipe(recipe, "r.yaml")))
    assert (error.code, error.key) == ("unknown-key", key)
    assert ours in str(error)


def test_an_objective_with_a_name_of_trl() -> None:
    error = refused(
        lambda: objective_of("objective", Named(name="kto", arguments={"desirable_weight": 2.0}), 0)
    )
    assert "objective: {name: kto, desirable: ...}" in str(error)


@pytest.mark.parametrize(
    ("call", "ours"),
    [
        (lambda: tokenward.SelectiveTrainer("default", None, [], ref_model="other"), "reference=..."),
        (lambda: tokenward.train_oracle("default", [], args=None, tokenizer=None), "processing_class=..."),
        (lambda: tokenward.train_reward("default", [], args=None, max_length=9), "TokenSettings("),
        (lambda: tokenward.score([], ref_model="other"), "reference=..."),
        (lambda: tokenward.evaluate("default", [], compute_metrics=print), "takes metrics"),
        (lambda: tokenward.DPO(loss_type="ipo"), "DPO(loss=...)"),
        (lambda: tokenward.TokenSettings(truncation_mode="keep_end"), "too_long"),
        (lambda: TokenTrainingArguments("out", padding_free=True), 'packing="auto"'),
        (lambda: tokenward.SamplingSettings(min_p=0.1), "online: {sampler"),
    ],
)
def test_a_script_with_a_name_of_trl(call, ours: str) -> None:
    error = refused(call)
    assert error.code == "trl-name"
    assert ours in str(error)


@pytest.mark.filterwarnings("ignore")  # TRL's own
def test_a_configuration_of_trl_is_answered_setting_by_setting(tmp_path) -> None:
    trl = pytest.importorskip("trl")
    args = trl.DPOConfig(str(tmp_path), beta=0.3, max_length=77, use_cpu=True, bf16=False, report_to="none")
    error = refused(lambda: token_arguments(args))
    assert "objective=DPO(beta=...)" in str(error)
    assert "TokenSettings(max_prompt_tokens" in str(error)


def test_other_unknown_names_are_answered_as_before() -> None:
    with pytest.raises(TypeError, match="betta"):
        tokenward.DPO(betta=0.1)
    assert trl_advice("learning_rat", recipe=True) == ""
