"""The script for a machine with a GPU, as far as a CPU runs it."""

import json

import torch

from benchmarks import gpu_checks, gpu_step
from benchmarks.model import Layout, Rates
from benchmarks.turns import Turns


def test_the_script_runs_on_a_cpu_and_fails_where_results_differ(tmp_path, monkeypatch, capsys):
    out = tmp_path / "found" / "step.json"
    command = ["gpu_step", "--device", "cpu", "--tiny", "--skip-speed", "--out", str(out)]
    monkeypatch.setattr("sys.argv", command)
    assert gpu_step.main() == 0
    found = json.loads(out.read_text())["checks"]
    assert [case["within"] for case in found["equal"]] == [True] * 8
    for case in found["equal"]:
        # The CPU against itself: the same bits in the same layout, and rounding in bfloat16 for all to see.
        exact = (case["precision"], case["layout"]) == ("float32", "shared")
        assert (case["loss"] == case["gradient"] == case["score"] == 0.0) is exact
        assert case["score"] > 1e-4 or case["precision"] == "float32"
    seen = found["attention"]
    assert set(seen) == {f"{kind} {rows}" for kind in gpu_checks.ALLOWED for rows in ("shared", "separate")}
    assert any("flash_attention_for_cpu" in name for name in seen["float32 shared"]["names"])
    assert found["waits"] == ""
    # A device that computes something else is found.
    plain = gpu_checks.computed

    def wrong(model, *more):
        made = plain(model, *more)
        return made._replace(scores=made.scores + 0.5) if model.layout == "separate" else made

    monkeypatch.setattr(gpu_checks, "computed", wrong)
    assert gpu_step.main() == 1
    assert capsys.readouterr().out.count("TOO FAR") == 4


def test_without_a_gpu_nothing_runs_unasked(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu_step"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_step.main() == 0
    assert "no CUDA device" in capsys.readouterr().out


def test_figures_by_hand(tmp_path):
    sizes = {"layers": 1, "width": 4, "heads": 2, "kv_heads": 1, "inner": 6, "spread": 0.2}
    folder = gpu_step.make_model(tmp_path / "small", **sizes)
    pairs = [gpu_step.Pair(10, (20, 30)), gpu_step.Pair(2, (4, 4))]
    lengths = [[pair.prompt, list(pair.responses), 14] for pair in pairs]
    facts = {"lengths": lengths, "layouts": [[[1, 70]]]}
    turns = Turns(
        seconds={"sepo": [0.5, 0.5], "trl_dpo": [2.0, 1.0]},
        memory={"sepo": {"VmHWM": 2 * 10**9}, "trl_dpo": {"VmHWM": 1, "cuda": 3 * 10**9}},
        losses={},
        facts={"sepo": facts, "trl_dpo": {}},
        rates=Rates(operations=1e9, bytes=1.0),
    )
    found = gpu_step.figures(turns, folder, pairs, 2)
    assert found["trl_dpo"] == {"tokens_per_second": round(70 / 1.5, 1), "peak_gb": 3.0}
    assert found["sepo"]["tokens_per_second"] == 140.0
    assert found["sepo"]["peak_gb"] == 2.0
    assert found["sepo"]["times_trl"][0] == 3.0  # the median of 4 and 2
    # One layer: q, o 4 x 4; k, v 4 x 2; three of 4 x 6: 120 weights, 3 passes; the head of 257 x 4 for 28 tokens.
    products = 2 * 3 * (70 * 120 + 28 * 257 * 4)
    needed = gpu_step.training_step(
        gpu_step.Shape.of(gpu_step.LlamaConfig.from_pretrained(folder)),
        Layout((70,), 28),
        head_passes=3,
    )
    assert needed.products == products
    assert found["sepo"]["share_of_the_rate"] == round((products + needed.attention) / 0.5 / 1e9, 3)
