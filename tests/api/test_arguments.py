"""Wrong arguments of the library's functions are refused before anything is trained, and the message says what to pass."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import tokenward
from tests.api.conftest import TOKENS, Script, arguments
from tests.tiny import tiny_tokenizer
from tokenward.errors import UserError
from tokenward.models.loading import load_model
from tokenward.objectives import Losses, Needs

PLAIN = tokenward.TokenSettings(max_prompt_tokens=128, max_response_tokens=64, template="plain")


def trainer_of(script: Script, folder: Path, **given: Any) -> tokenward.SelectiveTrainer:
    model, rows = given.pop("model", script.model), given.pop("train_dataset", script.train)
    settings = {"tokens": TOKENS, "objective": tokenward.SimPO(), **given}
    return tokenward.SelectiveTrainer(model, arguments(folder, 2), rows, **settings)


def custom(result: Any, **needs: bool) -> Any:
    """A custom objective that returns a function of its log-probabilities."""

    class Custom:
        def __call__(self, logp: torch.Tensor, batch: Any) -> Any:
            return result(logp)

    if needs:
        Custom.needs = Needs(**needs)  # type: ignore[attr-defined]
    return Custom()


@pytest.mark.parametrize(
    ("word", "result"),
    [
        ("as loss", lambda logp: Losses(logp.mean(), {})),
        ("a Tensor", lambda logp: logp.mean()),
        ("as short", lambda logp: Losses(logp[:4], {"short": logp[:3].detach()})),
        ("a float as number", lambda logp: Losses(logp[:4], {"number": 0.5})),
        ("a list as metrics", lambda logp: Losses(logp[:4], [])),
    ],
)
def test_results_of_custom_objectives_are_checked(
    script: Script, tmp_path: Path, word: str, result: Any
) -> None:
    trainer = trainer_of(script, tmp_path, objective=custom(result))
    with pytest.raises(UserError, match=word) as caught:
        trainer.train()
    assert caught.value.code == "wrong-result"


def test_a_custom_objective_that_returns_losses_trains(script: Script, tmp_path: Path) -> None:
    trainer_of(script, tmp_path, objective=custom(lambda logp: Losses(logp[:4], {}))).train()


def test_an_oracle_is_trained_with_checked_objectives_only(script: Script, tmp_path: Path) -> None:
    objective = custom(lambda logp: logp.mean())
    with pytest.raises(UserError) as caught:
        tokenward.train_oracle(
            script.model, script.train, args=arguments(tmp_path, 1), objective=objective, tokens=TOKENS
        )
    assert caught.value.code == "wrong-result"


def scored_row(**changes: Any) -> Dataset:
    row = {"response_keys": ["0" * 16], "response_ranks": [0], "response_eos": [1], "token_scores": [[1.0]]}
    return Dataset.from_list([{**row, **changes}])


@pytest.mark.parametrize(
    ("code", "word", "given"),
    [
        ("wrong-type", r"selector is 0.3, a float. Pass a selector, such as TopFraction\(0.3\)", {"selector": 0.3}),
        ("wrong-type", r"such as TopFraction\(\)", {"selector": "top_fraction"}),
        ("wrong-type", "the class TopFraction", {"selector": tokenward.TopFraction}),
        ("wrong-signature", "takes", {"selector": lambda scores, response: scores}),
        ("wrong-type", r"such as DPO\(\)", {"objective": "dpo"}),
        ("wrong-type", "the class DPO", {"objective": tokenward.DPO}),
        ("wrong-type", "None", {"objective": None}),
        ("wrong-signature", "takes", {"objective": lambda logp: logp}),
        ("wrong-type", "the class Surprisal", {"oracle": tokenward.Surprisal}),
        ("wrong-type", "the class LogRatio", {"scorer": tokenward.LogRatio}),
        ("two-scorers", "one of them", {"oracle": tokenward.Surprisal(), "scorer": tokenward.LogRatio()}),
        ("wrong-type", r"TokenSettings\(max_prompt_tokens=9\)", {"tokens": {"max_prompt_tokens": 9}}),
    ],
)  # fmt: skip
def test_arguments_of_the_wrong_type_are_refused_before_a_model_is_loaded(
    script: Script, tmp_path: Path, code: str, word: str, given: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=word) as caught:
        trainer_of(script, tmp_path, model="no such model", **given)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("word", "given"),
    [
        (r'\["vader"\]', {"metrics": "vader"}),
        ("a function", {"metrics": [lambda reply: 1.0]}),
        ("prompts is '4', a str", {"prompts": "4"}),
        ("TokenSettings", {"tokens": {}}),
    ],
)
def test_wrong_arguments_of_an_evaluation(script: Script, word: str, given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=word) as caught:
        tokenward.evaluate("no such model", script.eval, reference="no such model", **given)
    assert caught.value.code == "wrong-type"


def test_select_takes_a_scored_data_set_and_a_selector() -> None:
    given: Any
    for given, selector in (("scored.jsonl", None), (scored_row(), 0.3)):
        with pytest.raises(UserError) as caught:
            tokenward.select(given, selector=selector)
        assert caught.value.code == "wrong-type"


def test_an_evaluation_compares_models_of_one_tokenizer(script: Script) -> None:
    other = tiny_tokenizer()
    other.chat_template = str(other.chat_template).replace("user", "human") + " "
    policy = load_model(script.model, device="cpu")
    policy = replace(policy, tokenizer=other, fingerprint="")
    with pytest.raises(UserError) as caught:
        tokenward.evaluate(policy, script.eval, reference=script.model, tokens=TOKENS, quiet=True)
    assert caught.value.code == "tokenizer-mismatch"


def test_scores_of_another_template_are_refused(script: Script, tmp_path: Path) -> None:
    scored = tokenward.score(
        script.train, oracle=tokenward.Surprisal(), reference=script.model, tokens=PLAIN, quiet=True
    )
    with pytest.raises(UserError) as caught:
        trainer_of(script, tmp_path, train_dataset=scored)
    assert caught.value.code == "template-mismatch"
    trainer_of(script, tmp_path, train_dataset=scored, tokens=PLAIN)
