"""Speed and memory of a training: counted right, without what is not the training's, and shown."""

import json
import time
from collections import Counter
from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers import TrainerCallback

import tokenward
from tests.training.tools import arguments, language_model, random_rows
from tokenward.display import Display
from tokenward.objectives import SFT
from tokenward.training.callbacks import Speed, memory, speed_note
from tokenward.training.trainer import TokenTrainer


class Idle(TrainerCallback):
    """Takes its time between the steps."""

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(0.4)


def test_it_counts_what_went_through_the_model_and_not_what_lies_between(tmp_path):
    rows = random_rows(7)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    made = arguments(tmp_path, logging_steps=1, **settings)
    trainer = TokenTrainer(language_model(), SFT(), made, rows, eval_rows=rows[:3], callbacks=[Idle()])
    speed = Speed(trainer.seen)
    trainer.add_callback(speed)
    begun = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - begun
    tokens = sum(row.length for row in rows)
    trainer.evaluate()
    assert trainer.seen == Counter(comparisons=14, tokens=2 * tokens)
    facts = speed.facts()
    assert facts["tokens_per_second"] > 2 * tokens / (seconds - 4 * 0.4 + 0.05)
    assert facts["comparisons_per_second"] / facts["tokens_per_second"] == pytest.approx(7 / tokens, rel=1e-3)
    history = trainer.state.log_history
    logged = [entry for entry in history if "loss" in entry]
    assert len(logged) == 4
    assert all(entry["tokens_per_second"] > 0 for entry in logged)
    assert not any("tokens_per_second" in entry for entry in history if "eval_loss" in entry)


def test_an_interval_is_not_the_mean_of_all(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 14.0])  # a step of one second, then one of four
    monkeypatch.setattr("tokenward.training.callbacks.time.monotonic", lambda: next(clock))
    seen = Counter(comparisons=0, tokens=0)
    speed, state = Speed(seen), SimpleNamespace(global_step=0, logging_steps=1, log_history=[])
    for tokens in (100, 80):
        speed.on_step_begin(None, state, None)
        seen.update(comparisons=2, tokens=tokens)
        speed.on_optimizer_step(None, state, None)
        state.log_history.append({"loss": 1.0})
        speed.on_log(None, state, None, logs={"loss": 1.0})
    assert [entry["tokens_per_second"] for entry in state.log_history] == [100.0, 20.0]
    assert speed.facts()["tokens_per_second"] == 36.0


def test_memory_is_that_of_this_process():
    resource = pytest.importorskip("resource")
    peak = memory().get("peak_memory_gb")
    if peak is None:
        pytest.skip("the system does not report it")
    assert peak == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, rel=0.01)


def test_the_note_of_a_line():
    entry = {"tokens_per_second": 12345.6, "peak_memory_gb": 1.26}
    assert speed_note(entry) == "12,346 tokens/s  1.3 GB"
    assert speed_note(entry | {"peak_gpu_memory_gb": 20.04}) == "12,346 tokens/s  1.3 GB  GPU 20.0 GB"
    assert speed_note({"loss": 1.0}) == ""


def test_a_run_shows_and_keeps_them(tiny_workplace, capsys):
    run = tokenward.run(tiny_workplace, ["oracle.training.logging_steps=1"], last="oracle")
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  oracle")]
    assert any("tokens/s" in line and "GB" in line and "loss" in line for line in shown)
    history = [json.loads(line) for line in (run.path("oracle") / "history.jsonl").read_text().splitlines()]
    steps = [entry for entry in history if "loss" in entry]
    assert all(entry["comparisons_per_second"] > 0 and entry["peak_memory_gb"] > 0 for entry in steps)
    facts = run.done("oracle").facts
    assert facts["tokens_per_second"] > 0
    assert facts["peak_memory_gb"] >= steps[0]["peak_memory_gb"]


@pytest.mark.parametrize(("width", "last"), [(80, "tokens/s"), (100, "GB"), (160, "margins 1.512")])
def test_a_note_never_squeezes_the_bar(width, last, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tokenward.display.PLAIN_SECONDS", 0.0)  # a line at once
    note = "at step 19: loss 0.201  15,140 tokens/s  0.6 GB  accuracies 1.000  margins 1.512"
    screen, terminal = StringIO(), {"force_terminal": True, "color_system": None, "legacy_windows": False}
    with Display(console=Console(width=width, file=screen, **terminal)).progress("oracle", 200) as bar:
        bar.advance(20, note)
    assert all(words in screen.getvalue() for words in ("oracle", "20/200", last))
    assert "…" not in screen.getvalue()
    plain = StringIO()
    with Display(console=Console(width=80, file=plain)).progress("oracle", 10) as bar:
        bar.advance(1, note)
    assert plain.getvalue().count("\n") == 1
