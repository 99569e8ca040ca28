"""The scripts behind the tables of token credit and of selection stability, on tiny models."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import tokenward
from tests.tiny import WORDS
from tokenward.scoring.scorers import LogRatio
from tokenward.tokens.spans import ByteSpan

SCRIPTS = Path(__file__).parents[1] / "scripts"


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def credit() -> ModuleType:
    return loaded("qa_feedback_credit")


@pytest.fixture(scope="module")
def stability() -> ModuleType:
    return loaded("selection_stability")


# ---- human error spans


def published(number: int) -> dict:
    """An answer in the form of the data: one irrelevant and one wrong span, and a correction without them."""
    rng = np.random.default_rng(number)
    good = " ".join(rng.choice(WORDS, 5))
    text = f"{good} bad tea no cup"
    start = len(good) + 1
    errors = [
        {"start": start + 8, "end": start + 14, "error type": "Irrelevant"},
        {"start": start, "end": start + 7, "error type": "Wrong-Grounding"},
    ]
    corrected = f" {good}\n" if number % 4 else text  # every fourth answer was right as it was
    return {
        "question": f"What is {number}?",
        "prediction 1": text,
        "feedback": {"errors": errors if number % 4 else [], "corrected-prediction": corrected},
    }


@pytest.fixture(scope="module")
def answers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("feedback")
    for part in range(2):
        rows = [published(number) for number in range(8 * part, 8 * part + 8)]
        (folder / f"part{part}.json").write_text(json.dumps(rows))
    return folder


def test_answers_are_read_as_they_are_published(
    credit: ModuleType, answers_folder: Path, tmp_path: Path
) -> None:
    answers = credit.read_answers(answers_folder)
    assert [one.question for one in answers] == [f"What is {number}?" for number in range(16)]
    one = answers[1]
    assert [one.text[start:end] for start, end, _ in one.errors] == [
        "bad tea",
        "no cup",
    ]  # in the order of the text
    assert one.corrected == one.text.partition(" bad tea")[0]
    assert [one.is_pair for one in answers[:5]] == [False, True, True, True, False]
    with pytest.raises(tokenward.UserError, match=r"holds no \.json file"):
        credit.read_answers(tmp_path)


def test_folds_are_of_one_size_and_follow_the_seed(credit: ModuleType) -> None:
    folds = credit.folds_of(11, 3, seed=4)
    assert sorted(np.bincount(folds).tolist()) == [3, 4, 4]
    assert (folds == credit.folds_of(11, 3, seed=4)).all()
    assert (folds != credit.folds_of(11, 3, seed=5)).any()


def test_tokens_of_other_errors_are_left_out(credit: ModuleType) -> None:
    text = "ok bad no"
    answer = credit.Answer("?", text, "ok", [(3, 6, "Wrong-Grounding"), (7, 9, "Irrelevant")])
    tokens = [ByteSpan(0, 2), ByteSpan(2, 6), ByteSpan(6, 9), ByteSpan(9, 9)]  # the last one closes the turn
    one = credit.Scored(answer, tokens, {"log_ratio": [0.5, -1.0, -2.0, 9.0]}, {})
    every = credit.of_kind(one, ())
    assert every.values == [0.0, -1.0, -1.0]
    assert every.scores == {"log_ratio": [0.5, -1.0, -2.0]}
    wrong = credit.of_kind(one, ("Wrong-Grounding", "Unverifiable"))
    assert wrong.values == [0.0, -1.0]
    assert wrong.scores == {"log_ratio": [0.5, -1.0]}


def test_every_answer_is_scored_by_models_that_did_not_see_it(
    credit: ModuleType,
    answers_folder: Path,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole script: two folds, an oracle and a reward each, and the table."""
    small = {"learning_rate": 1e-3, "max_steps": 2, "per_device_train_batch_size": 4}
    arguments = [
        "script", str(answers_folder), "--runs", str(tmp_path / "runs"), "--resamples", "20",
        "--output", str(tmp_path / "out" / "credit"), "--set", f"model.name={tiny_folder}",
        "--set", f"oracle.training={json.dumps(small)}", "--set", f"reward.training={json.dumps(small)}",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    credit.main()
    record = json.loads((tmp_path / "out" / "credit.json").read_text())
    assert (record["answers"], record["pairs"], record["seeds"]) == (16, 12, [0])
    found = record["figures"]["all"]
    for scorer in credit.SCORERS:
        assert found[f"credit/auroc_lowering/{scorer}"]["n"] == 16
    # Both errors stand at the end of their answers, so what lies late points at them, whatever the models learned.
    assert found["credit/precision_at_5_lowering/position"]["value"] == 1.0
    assert found["pairs/shorter"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 12}
    assert (
        record["figures"]["irrelevant or redundant"]["share of tokens in an error, answers with one"]["n"]
        == 12
    )
    text = (tmp_path / "out" / "credit.md").read_text()
    assert text.count("| position, late |") == len(credit.KINDS)
    prompts = [
        {json.loads(line)["prompt"] for line in (fold / "pairs.jsonl").read_text().splitlines()}
        for fold in sorted((tmp_path / "runs" / "seed-0").iterdir())
    ]
    assert len(prompts) == 2
    assert prompts[0].isdisjoint(prompts[1])  # two folds: what one trains on, the other is asked about
    assert len(prompts[0] | prompts[1]) == 12
    folds = credit.folds_of(16, 2, seed=0)
    eval_rows = {f"What is {number}?" for number in np.flatnonzero(folds == 0)}
    assert prompts[0].isdisjoint(eval_rows)


# ---- selection stability


def test_a_run_selects_what_it_selects_and_another_scorer_something_else(
    stability: ModuleType,
    tiny_oracle: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tiny_oracle.parent
    scores = stability.stored(run, LogRatio())
    assert scores == stability.stored(run / "scores", LogRatio())
    texts = {stability.response_key(prompt, text): text for prompt, text in stability.texts_of(run)}
    assert set(scores) <= set(texts)
    monkeypatch.setattr(
        sys, "argv",
        ["script", str(run), str(run / "scores"), "--again", "tokens_per_batch=64", "--limit", "4"],
    )  # fmt: skip
    stability.main()
    lines = capsys.readouterr().out.splitlines()
    same = next(line for line in lines if "scores" in line and line.startswith("| ")).split("|")
    again = next(line for line in lines if "tokens_per_batch=64" in line).split("|")
    columns = next(line for line in lines if "jaccard/top" in line).split("|")
    for name in ("jaccard/top", "jaccard/bottom"):
        place = next(i for i, column in enumerate(columns) if column.strip() == name)
        assert same[place].strip() == "1.000 [1.000, 1.000]"
        assert (
            again[place].strip() == "1.000 [1.000, 1.000]"
        )  # another batch shape rounds, and selects the same here
    assert int(same[-2]) == len(scores)
    assert int(again[-2]) == 4


def test_scores_made_again_are_those_of_the_store(stability: ModuleType, tiny_oracle: Path) -> None:
    run = tiny_oracle.parent
    scores = stability.stored(run, LogRatio())
    again = stability.scored_again(run, "precision=float32", scores, 3)
    assert list(again) == sorted(scores)[:3]
    for key, values in again.items():
        assert values == pytest.approx(scores[key], abs=1e-5)
    rounded = stability.scored_again(run, "precision=bfloat16", scores, 3)
    assert any(values != pytest.approx(scores[key], abs=1e-5) for key, values in rounded.items())


def test_what_cannot_be_compared_is_said(
    stability: ModuleType, tiny_oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_oracle.parent
    for setting in ("precision=float16", "tokens_per_batch=many", "seed=1"):
        with pytest.raises(tokenward.UserError, match="write precision=float32"):
            stability.scored_again(run, setting, {}, None)
    (tmp_path / "scores").mkdir()
    with pytest.raises(tokenward.UserError, match="holds no scores"):
        stability.stored(tmp_path, LogRatio())
    monkeypatch.setattr(sys, "argv", ["script", str(run)])
    with pytest.raises(SystemExit):
        stability.main()
