"""The scripts that make the tables of token credit and of selection stability, on tiny models."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import tokenward
from scripts import qa_feedback_credit as credit
from scripts import selection_stability as stability
from tests.tiny import WORDS
from tokenward.scoring.basic import LogRatio
from tokenward.tokens.spans import ByteSpan


def published(number: int) -> dict:
    """An answer in the format of the data: one irrelevant and one wrong span; every fourth answer has no errors."""
    good = " ".join(np.random.default_rng(number).choice(WORDS, 5))
    text = f"{good} bad tea no cup"
    start = len(good) + 1
    errors = [
        {"start": start + 8, "end": start + 14, "error type": "Irrelevant"},
        {"start": start, "end": start + 7, "error type": "Wrong-Grounding"},
    ]
    return {
        "question": f"What is {number}?",
        "prediction 1": text,
        "feedback": {
            "errors": errors if number % 4 else [],
            "corrected-prediction": f" {good}\n" if number % 4 else text,
        },
    }


@pytest.fixture
def feedback(tmp_path: Path) -> Path:
    folder = tmp_path / "feedback"
    folder.mkdir()
    for part in range(2):
        rows = [published(number) for number in range(8 * part, 8 * part + 8)]
        (folder / f"part{part}.json").write_text(json.dumps(rows))
    return folder


def test_answers_are_read_and_split_into_folds(feedback: Path, tmp_path: Path) -> None:
    answers = credit.read_answers(feedback)
    assert [one.question for one in answers] == [f"What is {number}?" for number in range(16)]
    one = answers[1]
    assert [one.text[start:end] for start, end, _ in one.errors] == ["bad tea", "no cup"], "in text order"
    assert one.corrected == one.text.partition(" bad tea")[0]
    assert [one.is_pair for one in answers[:5]] == [False, True, True, True, False]
    with pytest.raises(tokenward.UserError):
        credit.read_answers(tmp_path)
    folds = credit.folds_of(11, 3, seed=4)
    assert sorted(np.bincount(folds).tolist()) == [3, 4, 4]
    assert (folds != credit.folds_of(11, 3, seed=5)).any()


def test_tokens_of_other_errors_are_excluded() -> None:
    answer = credit.Answer("?", "ok bad no", "ok", [(3, 6, "Wrong-Grounding"), (7, 9, "Irrelevant")])
    tokens = [ByteSpan(0, 2), ByteSpan(2, 6), ByteSpan(6, 9), ByteSpan(9, 9)]  # the last one is eos
    one = credit.Scored(answer, tokens, {"log_ratio": [0.5, -1.0, -2.0, 9.0]}, {})
    every, wrong = credit.of_kind(one, ()), credit.of_kind(one, ("Wrong-Grounding", "Unverifiable"))
    assert (every.values, every.scores) == ([0.0, -1.0, -1.0], {"log_ratio": [0.5, -1.0, -2.0]})
    assert (wrong.values, wrong.scores) == ([0.0, -1.0], {"log_ratio": [0.5, -1.0]})


def test_every_answer_is_scored_by_models_that_did_not_see_it(
    feedback: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = json.dumps({"learning_rate": 1e-3, "max_steps": 2, "per_device_train_batch_size": 4})
    arguments = [
        "script", str(feedback), "--runs", str(tmp_path / "runs"), "--resamples", "20",
        "--output", str(tmp_path / "out" / "credit"), "--set", f"model.name={tiny_folder}",
        "--set", f"oracle.training={small}", "--set", f"reward.training={small}",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    credit.main()
    record = json.loads((tmp_path / "out" / "credit.json").read_text())
    assert (record["answers"], record["pairs"], record["seeds"]) == (16, 12, [0])
    found = record["figures"]["all"]
    assert all(found[f"credit/auroc_lowering/{scorer}"]["n"] == 16 for scorer in credit.SCORERS)
    # Both errors are at the end of their answers, so the position finds them, whatever the models learned.
    assert found["credit/precision_at_5_lowering/position"]["value"] == 1.0
    assert found["pairs/shorter"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 12}
    assert (tmp_path / "out" / "credit.md").read_text().count("| position, late |") == len(credit.KINDS)
    first, second = (
        {json.loads(line)["prompt"] for line in (fold / "pairs.jsonl").read_text().splitlines()}
        for fold in sorted((tmp_path / "runs" / "seed-0").iterdir())
    )
    assert (len(first | second), first & second) == (12, set())
    scored = {f"What is {number}?" for number in np.flatnonzero(credit.folds_of(16, 2, seed=0) == 0)}
    assert first.isdisjoint(scored)


def test_a_run_selects_the_same_tokens_as_itself(
    tiny_oracle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_oracle.parent
    scores = stability.stored(run, LogRatio())
    monkeypatch.setattr(
        sys,
        "argv",
        ["script", str(run), str(run / "scores"), "--again", "tokens_per_batch=64", "--limit", "4"],
    )
    stability.main()
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    head, same, again = table
    for name in ("jaccard/top", "jaccard/bottom"):
        place = head.index(name) + (len(same) - len(head))
        assert same[place] == again[place] == "1.000 [1.000, 1.000]"
    assert (same[-1], again[-1]) == (f"{len(scores)} |", "4 |")


def test_new_scores_differ_only_by_rounding_and_wrong_settings_are_refused(
    tiny_oracle: Path, tmp_path: Path
) -> None:
    run = tiny_oracle.parent
    scores = stability.stored(run, LogRatio())
    again, rounded = (
        stability.scored_again(run, f"precision={name}", scores, 3) for name in ("float32", "bfloat16")
    )
    assert list(again) == sorted(scores)[:3]
    assert all(values == pytest.approx(scores[key], abs=1e-5) for key, values in again.items())
    assert any(values != pytest.approx(scores[key], abs=1e-5) for key, values in rounded.items())
    for setting in ("precision=float16", "tokens_per_batch=many", "seed=1"):
        with pytest.raises(tokenward.UserError):
            stability.scored_again(run, setting, {}, None)
    with pytest.raises(tokenward.UserError):
        stability.stored(tmp_path, LogRatio())
