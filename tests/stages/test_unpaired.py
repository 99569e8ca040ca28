"""Runs on rows of one response each: what trains, what is refused, and what a run reports."""

import json
from pathlib import Path

import pytest
import yaml

import tokenward
from tests.stages.runs import lines, refusal, write_lines
from tests.tiny import planted_rows
from tokenward.errors import UserError
from tokenward.report.show import shown_pair
from tokenward.stages.lists import carry_out
from tokenward.tools.plan import plan_recipe

KTO = ["scores.scorer={name: surprisal}", "policy.selection={name: all}"]
RUN = Path("runs/quickstart")


def unpaired(count: int) -> list[dict]:
    """The best and the worst of planted replies, each as a row of its own."""
    rows = planted_rows(count)
    return [
        {"prompt": row["prompt"], "completion": row["responses"][place], "label": place == 0}
        for row in rows
        for place in (0, 2)
    ]


def history(stage: str) -> list[dict]:
    return lines(RUN / stage / "history.jsonl")


def metrics() -> dict:
    return json.loads((RUN / "evaluation" / "metrics.json").read_text())


def test_kto_trains_on_unpaired_rows_without_an_oracle(tiny_workplace: Path, capsys) -> None:
    write_lines("kto.jsonl", unpaired(12))
    training = "policy.training={max_steps: 3, per_device_train_batch_size: 4, logging_steps: 1, eval_strategy: steps, eval_steps: 3}"
    tokenward.run(tiny_workplace, ["data.source=kto.jsonl", "policy.objective={name: kto}", training, *KTO])
    shown = capsys.readouterr().out
    assert "unpaired, train" in shown
    assert {path.parent.name for path in RUN.glob("*/manifest.json")} == {
        "data", "reference", "scores", "policy", "evaluation",
    }  # fmt: skip
    found = metrics()
    assert {name for name in found if name.startswith("unpaired")} == {
        "unpaired/good_change",
        "unpaired/bad_change",
    }
    assert not any(name.startswith("preference") for name in found)
    eval_rows = json.loads((RUN / "data" / "manifest.json").read_text())["facts"]["unpaired"]["eval"]
    assert sum(found[f"unpaired/{side}_change"]["n"] for side in ("good", "bad")) == eval_rows > 0
    assert (RUN / "report" / "index.html").is_file()
    steps = [entry for entry in history("policy") if "loss" in entry]
    assert steps[0]["loss"] == pytest.approx(0.5)  # 1 - sigma(0), before the first update
    with pytest.raises(UserError, match="response"):
        shown_pair(RUN, 1)


def test_pairs_and_unpaired_rows_train_together(tiny_workplace: Path) -> None:
    write_lines("kto.jsonl", unpaired(8))
    source = "data.source=[pairs.jsonl, kto.jsonl]"
    changes = [source, "policy.objective={name: kto}", *KTO]
    run = tokenward.run(tiny_workplace, changes, quiet=True)
    assert {"preference/accuracy", "unpaired/good_change"} <= tokenward.read_figures(run).keys()
    facts = json.loads((RUN / "data" / "manifest.json").read_text())["facts"]
    assert facts["format"] == "ranked, unpaired"
    assert 0 < sum(facts["unpaired"].values()) < facts["train"] + facts["eval"]
    assert run.done("policy").facts["rows"] == facts["train"]


def test_likelihood_trains_on_good_responses_only(tiny_workplace: Path) -> None:
    write_lines("kto.jsonl", unpaired(12))
    likelihood = "policy.objective={name: weighted_likelihood}"
    sft = "sft={training: {max_steps: 2, per_device_train_batch_size: 4}}"
    run = tokenward.run(
        tiny_workplace, ["data.source=kto.jsonl", likelihood, sft, *KTO], last="policy", quiet=True
    )
    train = run.done("data").facts["unpaired"]["train"]
    assert run.done("policy").facts["rows"] == run.done("sft").facts["rows"] == train // 2


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        ([], "oracle, dpo"),
        (["scores.scorer={name: surprisal}"], "policy, sepo"),
        (["scores.scorer={name: reward}"], "reward"),
        (
            ["auxiliary_models={worse: {swap_labels: true, objective: {name: kto}, training: {max_steps: 1}}}",
             "scores.scorer={name: log_ratio, numerator: worse, denominator: reference}"],
            "worse",
        ),
        ([*KTO, "policy.objective={name: kto}", "eval_reward={}"], "eval_reward, dpo"),
        ([*KTO, "policy.objective={name: sum, terms: [{name: kto}, {name: dpo}]}"], "policy, sum"),
    ],
)  # fmt: skip
def test_what_needs_pairs_is_refused_before_anything_runs(tiny_workplace: Path, overrides, word) -> None:
    write_lines("kto.jsonl", unpaired(12))
    error = refusal(tiny_workplace, ["data.source=kto.jsonl", *overrides], last="evaluation")
    assert error.code == "needs-pairs"
    assert str(error).startswith("24 of 24 rows")
    assert word in str(error)
    assert [path.parent.name for path in RUN.glob("*/manifest.json")] == ["data"]


def test_selection_that_keeps_nothing_and_a_plan_without_pairs_are_refused(tiny_workplace: Path) -> None:
    write_lines("kto.jsonl", unpaired(12))
    given = ["data.source=kto.jsonl", "policy.objective={name: kto}", "scores.scorer={name: surprisal}"]
    nothing = [*given, "policy.selection={name: threshold, above: 1.0e9}"]
    assert "no token" in str(refusal(tiny_workplace, nothing, last="policy"))
    with pytest.raises(UserError) as caught:
        plan_recipe(tiny_workplace, ["data.source=kto.jsonl"], quiet=True)
    assert caught.value.code == "needs-pairs"


def test_advice_works(tiny_workplace: Path) -> None:
    """Following the messages makes the run work."""
    recipe = yaml.safe_load(tiny_workplace.read_text())
    recipe["data"]["source"] = write_lines("kto.jsonl", unpaired(12))
    for _ in range(3):
        tiny_workplace.write_text(yaml.safe_dump(recipe))
        try:
            tokenward.run(tiny_workplace, last="policy", quiet=True)
            break
        except UserError as error:
            said = str(error)
        if "do without an oracle: " in said:
            recipe |= yaml.safe_load(said.split("do without an oracle: ")[1].split(", with")[0])
            recipe["policy"]["selection"] = {"name": "all"}
        else:
            recipe["policy"]["objective"] = yaml.safe_load(
                said.split("policy.objective: ")[1].split(" or ")[0]
            )
    assert (RUN / "policy" / "manifest.json").is_file()


def test_oracle_may_train_with_kto(tiny_workplace: Path) -> None:
    write_lines("kto.jsonl", unpaired(12))
    tokenward.run(
        tiny_workplace,
        ["data.source=kto.jsonl", "oracle.objective={name: kto}", "policy.objective={name: kto}"],
        last="policy",
        quiet=True,
    )
    kept = json.loads((RUN / "policy" / "manifest.json").read_text())["facts"]["kept"]
    assert set(kept) == {"chosen", "rejected"}


def test_eval_rows_may_have_their_own_source(tiny_workplace: Path, capsys) -> None:
    rows = planted_rows(24)
    Path("all").mkdir()
    write_lines("all/train.jsonl", rows[:18])
    write_lines("all/test.jsonl", [*rows[18:], rows[0]])
    given = ["data={source: all, eval: {split: test}}"]
    run = tokenward.open_run(tiny_workplace, given)
    facts = carry_out(run, "data").facts
    assert (facts["train"], facts["eval"]) == (18, 6)
    assert facts["evaluation"] == {"read": 7, "kept": 6, "prompt also in the training rows": 1}
    shown = capsys.readouterr().out
    assert "rows of data.eval" in shown
    before = json.loads((RUN / "data" / "manifest.json").read_text())["inputs"]
    write_lines("other.jsonl", rows[20:])
    run = tokenward.open_run(tiny_workplace, ["data={source: all, eval: {source: other.jsonl}}"])
    assert carry_out(run, "data").facts["eval"] == 4
    after = json.loads((RUN / "data" / "manifest.json").read_text())["inputs"]
    assert before["evaluation source"] != after["evaluation source"]


def test_columns_that_are_not_read_are_shown_and_recorded(tiny_workplace: Path, capsys) -> None:
    write_lines("more.jsonl", [{**row, "note": "x", "weight": 2} for row in planted_rows(12)])
    run = tokenward.open_run(tiny_workplace, ["data.source=more.jsonl"])
    facts = carry_out(run, "data").facts
    assert facts["columns_not_read"] == ["note", "weight"]
    assert "columns not read: note, weight" in capsys.readouterr().out
