"""Replies to fixed prompts while a model trains: what is written, and that the training does not notice."""

import json
import shutil
from pathlib import Path

import pytest

import tokenward
from tests.stages.runs import LOOKS, digests, guided, lines, press_when
from tests.tiny import save_tiny, tiny_llama
from tokenward.training.fit import Interrupted

RUN = Path("runs/quickstart")
CHANGES = (
    "policy.training.eval_strategy=steps",
    "policy.training.eval_steps=2",
    "policy.training.disable_dropout=false",
    "policy.training.learning_rate=0.05",
)


def replies(folder: Path) -> list[dict]:
    return lines(folder / "samples.jsonl")


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def test_the_same_prompts_down_a_column_and_the_same_weights(tiny_workplace: Path, tmp_path: Path, capsys):
    """Of a model whose training draws random numbers at every step."""
    dropout = f"model.name={save_tiny(tmp_path / 'dropout', tiny_llama(attention_dropout=0.3))}"
    changes = [*CHANGES, dropout, "scores.scorer={name: random}"]
    run = tokenward.run(tiny_workplace, [*changes, "fixed_prompts=2"], last="policy")
    shown = capsys.readouterr().out
    for words in ("replies before training", "replies after 4 steps", " -> "):
        assert words in shown
    found = replies(run.path("policy"))
    assert [line["step"] for line in found] == [0, 0, 2, 2, 4, 4]
    assert len({line["key"] for line in found}) == 2
    columns = [[line["prompt"] for line in found if line["step"] == step] for step in (0, 2, 4)]
    assert columns[0] == columns[1] == columns[2]
    assert {line["reply"] for line in found[:2]} != {line["reply"] for line in found[4:]}
    watched = weights(run.path("policy"))
    none = tokenward.run(tiny_workplace, [*changes, "fixed_prompts=0", "run=none"], last="policy", quiet=True)
    assert not (none.path("policy") / "samples.jsonl").exists()
    assert weights(none.path("policy")) == watched


def test_the_last_replies_are_those_of_the_evaluation(finished_run: Path) -> None:
    """The same prompts, seed and settings; the evaluation has a longest reply of its own, so only the prompts must agree."""
    stages = (finished_run / RUN / "policy", finished_run / RUN / "evaluation")
    before, evaluated = map(replies, stages)
    assert [line["key"] for line in before if line["step"] == 0][:4] == [line["key"] for line in evaluated]


def test_a_stop_leaves_no_line_twice(copied_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(*changes: str) -> list[dict]:
        run = tokenward.run(copied_run, [*CHANGES, "fixed_prompts=1", *changes], last="policy", quiet=True)
        return replies(run.path("policy"))

    shutil.copytree(RUN, "runs/whole")
    whole = trained("run=runs/whole")
    with monkeypatch.context() as patch:
        press_when(patch, lambda state: state.global_step == 1)
        with pytest.raises(Interrupted):
            trained()
    with (RUN / "policy" / "samples.jsonl").open("a") as file:
        # A look after the checkpoint, as before a power cut.
        file.write(json.dumps({"step": 4, "key": "", "prompt": "", "reply": "lost", "ended": True}) + "\n")
    assert trained() == whole


def test_an_online_run_answers_development_prompts_at_each_look(recipe: Path, finished_online: Path) -> None:
    watched = finished_online / "runs" / "guided"
    steps = [line["step"] for line in replies(watched / "online")]
    assert {step: steps.count(step) for step in steps} == dict.fromkeys((0, 2, 4, 6), 5)
    assert digests(guided(recipe, *LOOKS, "fixed_prompts=0")) == digests(watched)
