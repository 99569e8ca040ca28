"""What a run must survive or refuse: torn checkpoints, late interrupts, odd splits, models that do not fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import tokenward
from tests.stages.runs import lines, press_when, tables_of, write_lines
from tests.tiny import planted_rows
from tokenward.errors import UserError
from tokenward.scoring.join import scored
from tokenward.scoring.store import TokenStore
from tokenward.selection import SideRule, TopFraction
from tokenward.selection.weights import weigh_rows, weigh_step
from tokenward.stages.auxiliary import scorer_of
from tokenward.stages.lists import carry_out

RUN = Path("runs/quickstart")


def test_without_eval_rows_the_run_says_so_and_ends_with_no_figures(tiny_workplace, capsys):
    tokenward.run(tiny_workplace, ["data.eval=0.3"], last="data")
    assert "nothing can be evaluated" not in capsys.readouterr().out
    short = [f"{stage}.training.max_steps=1" for stage in ("oracle", "policy")]
    run = tokenward.run(tiny_workplace, ["data.eval=0", *short])
    assert "nothing can be evaluated" in " ".join(capsys.readouterr().out.split())
    assert tokenward.read_figures(run) == {}


def test_a_torn_checkpoint_is_left_out(finished_run: Path, tiny_workplace: Path) -> None:
    torn = RUN / "oracle" / "checkpoints" / "checkpoint-99"
    tokenward.run(tiny_workplace, last="reference", quiet=True)
    run = tokenward.open_run(tiny_workplace, quiet=True)
    torn.mkdir(parents=True)  # as a kill during the write leaves it: no trainer_state.json
    (torn / "model.safetensors").write_bytes(b"torn")
    shutil.copy(finished_run / RUN / "oracle" / "manifest.json", RUN / "oracle" / "manifest.json")
    manifest = json.loads((RUN / "oracle" / "manifest.json").read_text())
    (RUN / "oracle" / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    carry_out(run, "oracle")
    ours, theirs = (folder / "oracle/model/model.safetensors" for folder in (RUN, finished_run / RUN))
    assert ours.read_bytes() == theirs.read_bytes()


def test_an_interrupt_in_the_last_step_loses_nothing(tiny_workplace: Path, monkeypatch) -> None:
    press_when(monkeypatch, lambda state: state.global_step == state.max_steps)
    run = tokenward.run(tiny_workplace, ["oracle.training.max_steps=1"], last="oracle", quiet=True)
    assert run.done("oracle").complete


def test_evaluation_while_training_has_the_names_of_trl(tiny_workplace: Path) -> None:
    changes = [
        "policy.selection={name: top_fraction, scope: batch}",
        "policy.training={eval_strategy: steps, eval_steps: 2, max_steps: 2, per_device_train_batch_size: 4}",
    ]
    tokenward.run(tiny_workplace, changes, last="policy", quiet=True)
    history = lines(RUN / "policy" / "history.jsonl")
    found = next(entry for entry in history if "eval_loss" in entry)
    assert {"eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen"} <= set(found)
    assert found["eval_kept/chosen"] == 1.0, "held-out pairs are judged by every token"


def test_a_batch_wide_selection_leaves_each_side_a_token(copied_run: Path) -> None:
    """And is the selector's own where that keeps something."""
    run = tokenward.open_run(copied_run, quiet=True)
    some = list(scored(tables_of(run).train, scorer_of(run), TokenStore(run.path("scores")))[:8])
    few = TopFraction(chosen=SideRule(fraction=0.02), rejected=SideRule(fraction=0.02), scope="batch")
    assert all(bool((side != 0).any()) for row in weigh_step(few, some) for side in row.weights or ())
    plain, batch = weigh_rows(TopFraction(), some), weigh_step(TopFraction(), some)
    for one, other in zip(plain, batch, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.weights or (), other.weights or (), strict=True))


def test_a_referee_needs_pairs_and_leaves_some(tiny_workplace: Path) -> None:
    write_lines("pairs.jsonl", planted_rows(4))
    with pytest.raises(UserError, match="leaves"):
        tokenward.run(tiny_workplace, ["eval_reward={fraction: 0.001}"], quiet=True)


def test_files_behind_a_pattern_are_looked_at(tiny_workplace: Path) -> None:
    for name in ("a", "b"):
        Path(f"many/{name}").mkdir(parents=True)
        shutil.copy("pairs.jsonl", f"many/{name}/train.jsonl")
    change = ["data.source=many/*/train.jsonl"]
    first = tokenward.run(tiny_workplace, change, last="data", quiet=True).done("data").fingerprint
    write_lines("many/b/train.jsonl", planted_rows(30, seed=1))
    second = tokenward.run(tiny_workplace, change, last="data", quiet=True).done("data").fingerprint
    assert first != second


def test_pairs_that_lie_too_close_are_counted(tiny_workplace: Path) -> None:
    rows = planted_rows(20)
    for row in rows[:5]:
        row["scores"] = [0.1, 0.05, 0.0]
    write_lines("pairs.jsonl", rows)
    run = tokenward.run(tiny_workplace, ["data.min_gap=1.0"], last="reference", quiet=True)
    counts = run.done("reference").facts["pairs"]
    assert counts["comparisons without a pair: closer than data.min_gap"] == 5
    assert counts["kept"] == 15


def test_sft_counts_the_best_response_of_a_prompt_once(tiny_workplace: Path) -> None:
    run = tokenward.open_run(tiny_workplace, ["data.pairs=all"], quiet=True)
    pairs = tables_of(run).train
    rows = pairs.best_once()
    texts = [row.comparison.responses[0] for row in rows]
    assert len(pairs) == 3 * len(rows)
    assert all("good" in text for text in texts)
