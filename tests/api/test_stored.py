"""Scores and weights of a data set reach the tokens that they were made for, in every form, or are refused."""

from pathlib import Path
from typing import Any, cast

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

import tokenward
from tests.api.conftest import TOKENS, Script, arguments
from tests.api.test_kinds import Longest, wrong
from tokenward.errors import UserError
from tokenward.tokens.table import TokenTable


def pairs_of(script: Script, count: int = 6) -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"], "chosen": row["responses"][0], "rejected": row["responses"][2]}
        for row in script.train[:count]
    ]


@pytest.fixture(scope="module")
def selected(script: Script) -> Dataset:
    """Pairs with scores by position and the weights of TopFraction(0.3)."""
    return tokenward.select(scored(script, pairs_of(script)))


def scored(script: Script, rows: Any, **more: Any) -> Dataset:
    more = {"tokens": TOKENS, "quiet": True, **more}
    return tokenward.score(rows, scorer=Longest(), processing_class=tokenizer_of(script), **more)


def tokenizer_of(script: Script) -> Any:
    return AutoTokenizer.from_pretrained(script.model)


def trained_weights(script: Script, folder: Path, rows: Any, **more: Any) -> list[list[list[float]]]:
    """The weights of each token of each row that would train."""
    trainer = tokenward.SelectiveTrainer(
        script.model, arguments(folder, 1), rows, objective=tokenward.DPO(), tokens=TOKENS, **more
    )
    table = trainer.train_dataset
    assert isinstance(table, TokenTable)
    return [[one.tolist() for one in table[number].weights or ()] for number in range(len(table))]


def test_weights_survive_in_every_form_of_rows(script: Script, tmp_path: Path, selected: Dataset) -> None:
    expected = selected["token_weights"][:]
    for rows in (selected, selected.to_list(), selected.to_iterable_dataset()):
        assert trained_weights(script, tmp_path, rows) == expected


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda lists: [[*lists[0], 0.0], *lists[1:]], "wrong-length"),
        (lambda lists: [[*lists[0], 0.0], lists[1][:-1]], "wrong-length"),
        (lambda lists: [lists[0][:-1], *lists[1:]], "wrong-length"),
        (lambda lists: None, "wrong-length"),
        (lambda lists: [[-1.0, *lists[0][1:]], *lists[1:]], "wrong-result"),
        (lambda lists: [[float("nan"), *lists[0][1:]], *lists[1:]], "wrong-result"),
    ],
)
def test_weights_that_do_not_fit_the_tokens_are_refused(
    change: Any, code: str, script: Script, tmp_path: Path, selected: Dataset
) -> None:
    rows = selected.to_list()
    rows[1]["token_weights"] = change(rows[1]["token_weights"])
    assert wrong(script, tmp_path, train_dataset=Dataset.from_list(rows), objective=tokenward.DPO()) == code


def test_scoring_again_drops_what_belongs_to_the_old_scores(script: Script, selected: Dataset) -> None:
    again = scored(script, selected)
    assert "token_weights" not in again.column_names
    assert again["token_scores"][:] == selected["token_scores"][:]


def test_one_response_with_two_sets_of_weights_is_refused(script: Script, tmp_path: Path) -> None:
    row = script.train[0]
    best, middle, worst = row["responses"][:3]
    chain = [
        {"prompt": row["prompt"], "chosen": best, "rejected": middle},
        {"prompt": row["prompt"], "chosen": middle, "rejected": worst},
    ]
    both = tokenward.select(scored(script, chain))
    assert wrong(script, tmp_path, train_dataset=both, objective=tokenward.DPO()) == "ambiguous-response"
    # The trainer's own selection knows the pair, so it is the way out.
    sides = trained_weights(script, tmp_path, both, selector=tokenward.TopFraction(0.3))
    assert sides[0][1] != sides[1][0]


def test_weights_of_lists_train_no_other_pairs(script: Script, tmp_path: Path) -> None:
    lists = tokenward.select(scored(script, script.train[:4]))
    given = {"train_dataset": lists, "objective": tokenward.DPO(), "pairs": "adjacent"}
    assert wrong(script, tmp_path, **given) == "ambiguous-response"


def test_eval_weights_do_not_replace_those_of_training(
    script: Script, tmp_path: Path, selected: Dataset
) -> None:
    other = [
        {**row, "token_weights": [[7.0] * len(one) for one in row["token_weights"]]}
        for row in selected.to_list()
    ]
    given = {"eval_dataset": Dataset.from_list(other), "objective": tokenward.DPO()}
    assert wrong(script, tmp_path, train_dataset=selected, **given) == "ambiguous-response"


@pytest.mark.parametrize(
    "settings", [{"template": "plain"}, {"max_prompt_tokens": 8, "too_long": "truncate"}]
)
def test_scores_after_another_prompt_are_refused(
    settings: dict[str, Any], script: Script, tmp_path: Path
) -> None:
    other = tokenward.TokenSettings(**{"max_prompt_tokens": 128, "max_response_tokens": 64, **settings})
    rows = scored(script, pairs_of(script), tokens=other)
    code = wrong(script, tmp_path, train_dataset=rows, objective=tokenward.DPO())
    assert code in ("template-mismatch", "tokens-differ")


def test_rows_of_a_generator_all_train(script: Script, tmp_path: Path, selected: Dataset) -> None:
    """A look at the first row must not take it away."""
    plain = trained_weights(script, tmp_path, (row for row in pairs_of(script)))
    assert len(plain) == len(pairs_of(script))
    assert trained_weights(script, tmp_path, iter(selected.to_list())) == selected["token_weights"][:]


@pytest.mark.parametrize(
    "settings", [{"template": "plain"}, {"max_prompt_tokens": 8, "too_long": "truncate"}]
)
def test_a_folder_of_scores_after_another_prompt_is_refused(
    settings: dict[str, Any], script: Script, tmp_path: Path, finished_run: Path
) -> None:
    scores = finished_run / "runs" / "quickstart" / "scores"
    other = tokenward.TokenSettings(**{"max_prompt_tokens": 128, "max_response_tokens": 64, **settings})
    given = {"oracle": scores, "objective": tokenward.DPO(), "tokens": other}
    assert wrong(script, tmp_path, **given) == "template-mismatch"
    with pytest.raises(UserError) as caught:
        tokenward.score(
            pairs_of(script), oracle=scores, tokens=other, processing_class=tokenizer_of(script), quiet=True
        )
    assert caught.value.code == "template-mismatch"


def test_scoring_again_keeps_a_users_column(script: Script, selected: Dataset) -> None:
    counted = selected.add_column("token_count", cast(Any, [7] * len(selected)))
    assert scored(script, counted)["token_count"][:] == [7] * len(selected)
