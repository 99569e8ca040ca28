"""Wrong arguments of the library's functions are refused before anything is trained, and the message says what to pass."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict

import tokenward
from tests.api import test_kinds
from tests.api.conftest import TOKENS, Script, arguments
from tests.tiny import tiny_tokenizer
from tokenward.errors import UserError
from tokenward.models.loading import load_model
from tokenward.objectives import Losses


def trainer_of(script: Script, folder: Path, **given: Any) -> tokenward.SelectiveTrainer:
    return test_kinds.trainer_of(script, folder, **{"objective": tokenward.SimPO(), **given})


def custom(result: Any) -> Any:
    """A custom objective that returns a function of its log-probabilities."""

    class Custom:
        def __call__(self, logp: torch.Tensor, batch: Any) -> Any:
            return result(logp)

    return Custom()


@pytest.mark.parametrize(
    ("word", "result"),
    [
        ("as loss", lambda logp: Losses(logp.mean(), {})),
        ("a Tensor", lambda logp: logp.mean()),
        ("as short", lambda logp: Losses(logp[:4], {"short": logp[:3].detach()})),
        ("a float as number", lambda logp: Losses(logp[:4], {"number": 0.5})),  # type: ignore[dict-item]
        ("a list as metrics", lambda logp: Losses(logp[:4], [])),  # type: ignore[arg-type]
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
    objective = custom(lambda logp: Losses(logp[:4], {"first": logp[:4].detach()}))
    trainer = trainer_of(script, tmp_path, args=arguments(tmp_path, 2, logging_steps=1), objective=objective)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "first" in entry]
    assert len(logged) == 2
    assert all(entry["first"] == pytest.approx(entry["loss"], rel=1e-6) for entry in logged)


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
        ("two-scorers", "one of them", {"oracle": lambda record: [], "scorer": tokenward.LogRatio()}),
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


def test_an_unknown_metric_is_named_before_anything_is_loaded(script: Script) -> None:
    with pytest.raises(UserError, match="Did you mean 'vader'") as caught:
        tokenward.evaluate(
            "no such model", script.eval, reference="no such model", metrics=["vadr"], prompts=2
        )
    assert caught.value.code == "unknown-name"


def test_select_takes_a_scored_data_set_and_a_selector() -> None:
    given: Any
    selector: Any
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


def test_dropped_rows_are_counted_without_progress_bars(
    script: Script, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*script.train, {**script.train[0], "responses": ["same"] * 3, "spans": None}]
    trainer = trainer_of(script, tmp_path, train_dataset=rows, eval_dataset=script.train)
    assert f"{len(script.train)} of {len(rows)} kept; identical responses: 1" in caplog.text
    assert f"eval_dataset: 0 of {len(script.train)} kept" in caplog.text
    assert trainer.eval_dataset is None


def test_eval_rows_that_are_all_trained_on_are_refused_if_they_are_needed(
    script: Script, tmp_path: Path
) -> None:
    for train in (script.train, trainer_of(script, tmp_path).train_dataset):
        with pytest.raises(UserError, match=f"all {len(script.train)} rows of eval_dataset") as caught:
            tokenward.SelectiveTrainer(
                script.model,
                arguments(tmp_path, 1, eval_strategy="steps"),
                train,  # type: ignore[arg-type]
                train,  # type: ignore[arg-type]
                objective=tokenward.SimPO(),
                tokens=TOKENS,
            )
        assert caught.value.code == "no-eval-rows"


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("code", "word", "rows"),
    [
        ("wrong-type", r'with the splits train, test. Pass one of them: dataset\["train"\]', DatasetDict(
            {name: Dataset.from_list([PAIR]) for name in ("train", "test")}
        )),
        ("wrong-type", r"dataset.select\(range\(2\)\)", Dataset.from_list([PAIR] * 5)[:2]),
        ("wrong-type", "pairs.jsonl", "pairs.jsonl"),
    ],
)  # fmt: skip
def test_containers_that_are_no_rows(script: Script, tmp_path: Path, code: str, word: str, rows: Any) -> None:
    calls: list[Any] = [
        lambda: trainer_of(script, tmp_path, model="no such model", train_dataset=rows),
        lambda: trainer_of(script, tmp_path, model="no such model", eval_dataset=rows),
        lambda: tokenward.train_reward("no such model", rows, args=arguments(tmp_path, 1)),
        lambda: tokenward.score(rows, oracle=tokenward.Surprisal(), reference="no such model"),
        lambda: tokenward.evaluate("no such model", rows, reference="no such model"),
    ]
    for call in calls:
        with pytest.raises(UserError, match=word) as caught:
            call()
        assert caught.value.code == code


@pytest.mark.parametrize(
    ("word", "rows"),
    [
        (r"All 1 rows of train_dataset were dropped \(identical responses: 1\)", [{**PAIR, "rejected": "b"}]),
        ("train_dataset: contains no rows", []),
    ],
)
def test_without_rows_the_reason_is_given(script: Script, tmp_path: Path, word: str, rows: Any) -> None:
    with pytest.raises(UserError, match=word) as caught:
        trainer_of(script, tmp_path, train_dataset=rows)
    assert caught.value.code == "no-rows"


def test_scores_of_other_rows_name_the_row(script: Script, tmp_path: Path) -> None:
    scored = tokenward.score(
        script.train[1:], oracle=tokenward.Surprisal(), reference=script.model, tokens=TOKENS, quiet=True
    )
    with pytest.raises(UserError, match="train_dataset:row 1: ") as caught:
        trainer_of(script, tmp_path, oracle=scored)
    assert caught.value.code == "missing-response"


def test_a_prompt_that_is_too_long_names_its_row(script: Script, tmp_path: Path) -> None:
    tokens = tokenward.TokenSettings(max_prompt_tokens=1, too_long="error")
    with pytest.raises(UserError, match="train_dataset:row 1: the prompt has") as caught:
        trainer_of(script, tmp_path, tokens=tokens)
    assert caught.value.code == "too-long"


class NoScores:
    reads = ()

    def __call__(self, record: Any) -> torch.Tensor:
        return torch.full((len(record.ids),), torch.nan)


def test_scores_that_are_all_nan_are_refused(script: Script, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="every score is NaN") as caught:
        trainer_of(script, tmp_path, oracle=NoScores())
    assert caught.value.code == "no-scores"
    trainer_of(script, tmp_path, oracle=NoScores(), selector=tokenward.KeepAll())


@pytest.mark.parametrize(
    ("code", "word", "given"),
    [
        ("wrong-type", "model is a str", {"model": "tiny"}),
        ("wrong-type", "batch is a list", {"batch": [1, 2]}),
        ("wrong-type", "positions is a list", {"positions": [True]}),
        ("wrong-shape", r"input_ids\[None\]", {"batch": {"input_ids": torch.tensor([1, 2])}}),
    ],
)
def test_wrong_arguments_of_token_logprobs(
    script: Script, code: str, word: str, given: dict[str, Any]
) -> None:
    usual: dict[str, Any] = {
        "model": script.load(),
        "batch": {"input_ids": torch.ones(1, 2, dtype=torch.long)},
        "positions": torch.tensor([[False, True]]),
    }
    with pytest.raises(UserError, match=word) as caught:
        tokenward.token_logprobs(**{**usual, **given})
    assert caught.value.code == code


@pytest.mark.parametrize(("prompt", "response"), [(["How?"], "a"), ("How?", ["a"]), (3, "a"), ("How?", None)])
def test_a_token_scorer_scores_one_text(script: Script, prompt: Any, response: Any) -> None:
    with pytest.raises(UserError, match="text 1: ") as caught:
        script.oracle(prompt, response)
    assert caught.value.code == "wrong-type"


def test_missing_models_and_arguments_are_named(script: Script, tmp_path: Path) -> None:
    rows: Any = Dataset.from_list(script.train)
    for word, call in (
        ("model is None", lambda: tokenward.SelectiveTrainer(None, arguments(tmp_path, 1), rows)),  # type: ignore[arg-type]
        ("args is a Dataset", lambda: tokenward.SelectiveTrainer(script.model, rows, rows)),
    ):
        with pytest.raises(UserError, match=word) as caught:
            call()
        assert caught.value.code == "wrong-type"


def test_a_subclass_of_sepo_needs_scores_too(script: Script, tmp_path: Path) -> None:
    class Own(tokenward.SePO):
        pass

    with pytest.raises(UserError) as caught:
        trainer_of(script, tmp_path, objective=Own(gamma=1.0))
    assert caught.value.code == "missing-oracle"
