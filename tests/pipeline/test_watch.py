"""Replies to fixed prompts while a model trains: what is written, and that the training does not notice."""

import json
from pathlib import Path

import pytest

import tokenward
from tests.pipeline.tools import digests, guided, guided_recipe, press_when
from tokenward.training.fit import Interrupted

RUN = Path("runs/quickstart")
CHANGES = (
    "policy.training.eval_strategy=steps",
    "policy.training.eval_steps=2",
    "policy.training.disable_dropout=false",
    "policy.training.learning_rate=0.05",
)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def with_dropout(folder: Path) -> str:
    """A tiny model whose training draws random numbers at every step."""
    from tests.tiny import save_tiny, tiny_llama

    return f"model.name={save_tiny(folder, tiny_llama(attention_dropout=0.3))}"


def test_the_same_prompts_down_a_column_and_the_same_weights(tiny_workplace: Path, tmp_path: Path) -> None:
    changes = [*CHANGES, with_dropout(tmp_path / "dropout")]
    run = tokenward.run(tiny_workplace, [*changes, "fixed_prompts=2"], last="policy", quiet=True)
    found = lines(run.path("policy"))
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
    before, evaluated = map(lines, stages)
    assert [line["key"] for line in before if line["step"] == 0][:4] == [line["key"] for line in evaluated]


def test_a_stop_leaves_no_line_twice(tiny_workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tokenward.run(
        tiny_workplace, [*CHANGES, "fixed_prompts=1", "run=whole"], last="policy", quiet=True
    )
    tokenward.run(tiny_workplace, [*CHANGES, "fixed_prompts=1"], last="scores", quiet=True)
    press_when(monkeypatch, lambda state: state.global_step == 1)
    with pytest.raises(Interrupted):
        tokenward.run(tiny_workplace, [*CHANGES, "fixed_prompts=1"], last="policy", quiet=True)
    with (RUN / "policy" / "samples.jsonl").open(
        "a"
    ) as file:  # a look after the checkpoint, as before a power cut
        file.write(json.dumps({"step": 4, "key": "", "prompt": "", "reply": "lost", "ended": True}) + "\n")
    run = tokenward.run(tiny_workplace, [*CHANGES, "fixed_prompts=1"], last="policy", quiet=True)
    assert lines(run.path("policy")) == lines(whole.path("policy"))


def test_a_guided_run_answers_development_prompts_at_each_look(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = guided_recipe(tmp_path, tiny_folder)
    monkeypatch.chdir(tmp_path)
    run = guided(recipe, "fixed_prompts=2", "online.evaluate_every=3")
    assert [line["step"] for line in lines(run.path("online"))] == [0, 0, 3, 3, 6, 6]
    other = guided(recipe, "fixed_prompts=0", "online.evaluate_every=3", run="none")
    assert digests(other) == digests(run)


def test_the_screen_shows_each_look(tiny_workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenward.run(tiny_workplace, ["fixed_prompts=1"], last="policy")
    shown = capsys.readouterr().out
    assert "replies before training" in shown
    assert "replies after 4 steps" in shown
    assert " -> " in shown
