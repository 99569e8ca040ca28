"""Stops and kills at the worst moments: a stage resumes from its newest complete checkpoint and ends the same; and what is shown."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import tokenward
from tests.stages.runs import LOOKS, digests, events, lines, press_when, run_online
from tests.tiny import save_tiny, tiny_llama
from tokenward.display import Display
from tokenward.models.reward import RewardModel
from tokenward.stages import scores
from tokenward.stages.lists import run_through
from tokenward.training import fit
from tokenward.training.alternating import Alternating
from tokenward.training.fit import Interrupted

TOTAL = 6
OFTEN = "online.training.checkpoint_minutes=0.0"
PLAIN = "online.selection={name: all}"
RUNS = Path("runs")
RUN = RUNS / "quickstart"


class Killed(BaseException):
    """Stands for the end of the process."""


def die(*args, **kwargs) -> None:
    raise Killed


@pytest.fixture
def whole(finished_online: Path) -> Path:
    """The run that a killed one must end as."""
    return finished_online / "runs" / "online"


def cut(recipe: Path, *changes: str) -> None:
    with pytest.raises(Killed):
        run_online(recipe, OFTEN, *changes, run="cut")


def goes_on(monkeypatch, recipe: Path, *changes: str, steps: list[int]):
    """The run that was cut, which makes these updates of the policy."""
    seen = press_when(monkeypatch, lambda state: False)
    run = run_online(recipe, OFTEN, *changes, run="cut")
    assert [step for step, total in seen if total == TOTAL] == steps
    assert not (run.path("online") / "checkpoints").exists()
    return run


def same(one, other) -> None:
    assert digests(one) == digests(other)
    assert events(one) == events(other)


@pytest.mark.parametrize(
    "changes",
    [[PLAIN, "online.evaluate_every=1", "online.patience=2", "online.training.learning_rate=0.0"], [*LOOKS]],
    ids=["patience", "reward"],
)
def test_kill_after_the_last_update_makes_no_further_one(recipe, monkeypatch, whole, changes):
    if PLAIN in changes:
        whole = run_online(recipe, OFTEN, *changes, run="whole").folder
    with monkeypatch.context() as patch:
        patch.setattr(fit, "_save", die)
        cut(recipe, *changes)
    again = goes_on(monkeypatch, recipe, *changes, steps=[])
    same(again, whole)
    theirs = json.loads((whole / "online" / "manifest.json").read_text())["facts"]
    for name in ("steps", "best_step", "rewards_learned"):
        assert again.done("online").facts[name] == theirs[name]
    history = (again.path("online") / "history.jsonl").read_text()
    assert "train_runtime" not in history, "a training of no update has no mean loss"
    for name in ("model/config.json", "reward/config.json"):
        if (whole / "online" / name).exists():
            assert (again.path("online") / name).read_text() == (whole / "online" / name).read_text()


def test_kill_after_the_last_update_of_a_run_on_comparisons(tiny_workplace, finished_run, monkeypatch):
    changes = ["oracle.training.checkpoint_minutes=0.0"]
    with monkeypatch.context() as patch:
        patch.setattr(fit, "_save", die)
        with pytest.raises(Killed):
            tokenward.run(tiny_workplace, changes, last="oracle", quiet=True)
    steps = press_when(monkeypatch, lambda state: False)
    run = tokenward.run(tiny_workplace, changes, last="oracle", quiet=True)
    assert steps == []
    assert run.done("oracle").facts["steps"] == TOTAL
    ours, theirs = (folder / "oracle/model/model.safetensors" for folder in (RUN, finished_run / RUN))
    assert ours.read_bytes() == theirs.read_bytes()


def test_kill_while_checkpoints_are_written_and_removed_leaves_one(recipe, monkeypatch, whole):
    saved, removed = Alternating.on_save, shutil.rmtree

    def half(self, args, state, *rest, **more) -> None:
        die() if state.global_step == 3 else saved(self, args, state, *rest, **more)

    def torn(path, *args, **kwargs) -> None:
        if Path(path).name == "checkpoint-4":
            (Path(path) / "model.safetensors").unlink()
            raise Killed
        removed(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Alternating, "on_save", half)
        cut(recipe, *LOOKS)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", torn)
        cut(recipe, *LOOKS)
    same(goes_on(monkeypatch, recipe, *LOOKS, steps=[6]), whole)


def damaged(monkeypatch, name: str, *, other: bool) -> None:
    """Kill the next training after its last update, and damage a file of its newest checkpoint."""

    def killed(*args, **kwargs) -> None:
        newest = max(RUNS.glob("*/*/checkpoints/checkpoint-*"), key=lambda path: path.stat().st_mtime_ns)
        content = bytearray((newest / name).read_bytes())
        (newest / name).unlink()
        if other:
            content[-1] ^= 1
            (newest / name).write_bytes(content)
        raise Killed

    monkeypatch.setattr(fit, "_save", killed)


@pytest.mark.parametrize("name", ["reward.safetensors", "alternating.json"])
def test_a_sampled_run_goes_on_from_an_older_checkpoint_if_the_newest_is_damaged(
    recipe, monkeypatch, whole, capsys, name
):
    changes = [*LOOKS, "online.training.save_total_limit=2"]
    with monkeypatch.context() as patch:
        damaged(patch, name, other=name != "alternating.json")
        cut(recipe, *changes)
    again = goes_on(monkeypatch, recipe, *changes, steps=[6])
    same(again, whole)


def test_a_training_goes_on_from_an_older_checkpoint_if_the_newest_is_damaged(
    tiny_workplace, finished_run, monkeypatch, capsys
):
    changes = ["oracle.training.checkpoint_minutes=0.0", "oracle.training.save_total_limit=2"]
    with monkeypatch.context() as patch:
        damaged(patch, "optimizer.pt", other=False)
        with pytest.raises(Killed):
            tokenward.run(tiny_workplace, changes, last="oracle", quiet=True)
    steps = press_when(monkeypatch, lambda state: False)
    run = tokenward.run(tiny_workplace, changes, last="oracle")
    assert [step for step, _ in steps] == [TOTAL]
    said = " ".join(capsys.readouterr().out.split())
    assert "checkpoint-6/optimizer.pt is missing. It is now damaged-checkpoint-6" in said
    ours, theirs = (folder / "oracle/model/model.safetensors" for folder in (RUN, finished_run / RUN))
    assert ours.read_bytes() == theirs.read_bytes()
    assert not (run.path("oracle") / "checkpoints").exists()


def test_checkpoints_stay_until_the_stage_is_complete(recipe, monkeypatch, whole):
    with monkeypatch.context() as patch:
        patch.setattr(RewardModel, "save", die)
        cut(recipe, *LOOKS)
    same(goes_on(monkeypatch, recipe, *LOOKS, steps=[]), whole)


def test_requested_checkpoints_stay(recipe):
    changes = ["online.training.save_strategy=steps", "online.training.save_steps=1"]
    run = run_online(recipe, PLAIN, *changes, "online.training.save_total_limit=2")
    folder = run.path("online") / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-5", "checkpoint-6"]
    for path in folder.iterdir():
        assert json.loads((path / "alternating.json").read_text())["best"]["value"] is None


def test_slow_bfloat16_is_reported(tiny_workplace, monkeypatch, capsys):
    for imitated in (True, False):
        monkeypatch.setattr(fit, "imitates_bfloat16", lambda device, imitated=imitated: imitated)
        changes = [f"oracle.training={{bf16: true, max_steps: 1, seed: {int(imitated)}}}"]
        tokenward.run(tiny_workplace, changes, last="oracle")
        assert ("oracle.training.bf16=false is faster here" in capsys.readouterr().out) is imitated


def test_slow_float32_is_reported(tiny_workplace, monkeypatch, capsys):
    for module in (fit, scores):
        monkeypatch.setattr(module, "slow_float32", lambda device, dtype, *, half: not half)
    tokenward.run(tiny_workplace, ["oracle.training={max_steps: 1}"], last="oracle")
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("write scores.precision=bfloat16,") == 1
    assert shown.count("write oracle.training.bf16=true (TRL's default)") == 1
    changes = ["oracle.training={max_steps: 1, bf16: true}", "scores.precision=bfloat16"]
    tokenward.run(tiny_workplace, changes, last="oracle")
    assert "products are in float32" not in " ".join(capsys.readouterr().out.split())


def test_first_rows_are_compared_with_ln_2(tiny_workplace, tmp_path):
    start = "margin 0.0000 nats: policy = reference"
    for objective, words in (("dpo", f"loss 0.6931 (starts at ln 2 = 0.6931), {start}"), ("ipo", start)):
        changes = [f"policy.objective={{name: {objective}}}", "policy.training.max_steps=1"]
        run = tokenward.open_run(tiny_workplace, ["scores.scorer={name: random}", *changes])
        with (tmp_path / "shown.txt").open("w") as file:
            display = Display(console=Console(file=file, width=200))
            run_through(replace(run, display=display), "policy")
        shown = [line.strip() for line in (tmp_path / "shown.txt").read_text().splitlines()]
        assert [line for line in shown if line.startswith("first rows")] == [f"first rows: {words}"]


def test_training_with_warm_up_only_is_reported(tiny_workplace, capsys):
    for steps, idle in ((1, True), (2, False)):
        changes = [f"oracle.training.max_steps={steps}", "policy.training.max_steps=2"]
        tokenward.run(tiny_workplace, changes, last="policy")
        out = " ".join(capsys.readouterr().out.split())
        assert ("only one update" in out) is idle
        assert ("every score is 0" in out) is idle


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # peft, of a checkpoint
def test_best_model_with_an_adapter_is_restored(tiny_workplace):
    """By the largest loss, so that it is not the last."""
    best = "eval_strategy: steps, eval_steps: 1, save_strategy: steps, save_steps: 1, load_best_model_at_end: true"
    table = f"{{max_steps: 3, learning_rate: 0.1, warmup_steps: 0, metric_for_best_model: loss, greater_is_better: true, {best}}}"
    changes = ["model.adapter={r: 2, target_modules: [q_proj, embed_tokens]}", f"oracle.training={table}"]
    changes += ["oracle.training.save_total_limit=3"]
    run = tokenward.run(tiny_workplace, changes, last="oracle", quiet=True)
    history = lines(run.path("oracle") / "history.jsonl")
    losses = {line["step"]: line["eval_loss"] for line in history if "eval_loss" in line}
    first = max(losses, key=losses.get)
    saved = load_file(run.path("oracle") / "model" / "adapter_model.safetensors")
    kept = load_file(run.path("oracle") / "checkpoints" / f"checkpoint-{first}" / "adapter_model.safetensors")
    assert saved.keys() <= kept.keys()
    assert all(torch.equal(value, kept[name]) for name, value in saved.items())
    assert len(losses) == 3


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


def test_fixed_prompts_are_answered_without_changing_the_training(
    tiny_workplace: Path, tmp_path: Path, capsys
):
    """Of a model whose training draws random numbers at every step."""
    dropout = f"model.name={save_tiny(tmp_path / 'dropout', tiny_llama(attention_dropout=0.3))}"
    changes = [*CHANGES, dropout, "scores.scorer={name: random}"]
    run = tokenward.run(tiny_workplace, [*changes, "fixed_prompts=2"], last="policy")
    shown = capsys.readouterr().out.splitlines()
    where = str(run.path("policy") / "samples.jsonl")
    assert [line.split(":")[0] for line in shown if " -> " in line or where in line] == [
        f"  replies to 2 prompts are kept in {where}; one is shown here, all in the report",
        "  reply before training",
        "  reply after 2 steps",
        "  reply after 4 steps",
    ]
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


def test_fixed_prompts_are_the_first_of_the_evaluation(finished_run: Path) -> None:
    """The same prompts, seed and settings; the evaluation has a longest reply of its own, so only the prompts must agree."""
    stages = (finished_run / RUN / "policy", finished_run / RUN / "evaluation")
    before, evaluated = map(replies, stages)
    assert [line["key"] for line in before if line["step"] == 0][:4] == [line["key"] for line in evaluated]


def test_resumed_run_writes_no_reply_twice(copied_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_online_run_answers_development_prompts_at_each_evaluation(
    recipe: Path, finished_online: Path
) -> None:
    watched = finished_online / "runs" / "online"
    steps = [line["step"] for line in replies(watched / "online")]
    assert {step: steps.count(step) for step in steps} == dict.fromkeys((0, 2, 4, 6), 5)
    assert digests(run_online(recipe, *LOOKS, "fixed_prompts=0")) == digests(watched)


def test_an_online_run_shows_few_lines_for_each_part(recipe: Path, monkeypatch, capsys) -> None:
    """Two for each reward and each evaluation, however many samples, rankings and updates are behind them."""
    monkeypatch.setattr("tokenward.display.time.monotonic", lambda: 0.0)  # nothing takes long
    changes = [*LOOKS, "online.training.max_steps=20", "online.reward_steps=6"]
    tokenward.run(recipe, [*changes, "online.objective={name: reinforce}"], last="online")
    shown = capsys.readouterr().out.splitlines()
    kinds = Counter(line.split(":")[0].split("  ")[1] for line in shown if line.startswith("  "))
    looks, rewards = len(range(0, 21, 2)), len(range(0, 11, 3))
    assert kinds.pop("policy") == looks
    assert kinds.pop("reward") == rewards
    replies = sum(kinds.pop(kind) for kind in [*kinds] if kind.startswith("reply"))
    assert replies == looks
    assert kinds.total() <= 5, kinds


def test_evaluation_during_training_needs_eval_rows_that_are_left(tiny_workplace):
    """The share of eval rows is above 0, but no prompt falls into it."""
    changes = ["data.eval=0.0001", "oracle.training.eval_strategy=epoch"]
    with pytest.raises(tokenward.UserError) as refused:
        tokenward.run(tiny_workplace, changes, last="oracle", quiet=True)
    assert (refused.value.code, refused.value.key) == ("no-eval-rows", "oracle.training.eval_strategy")
