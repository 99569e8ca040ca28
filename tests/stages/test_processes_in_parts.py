"""Whole recipes in two processes that hold parts of the weights: the models come out as those of one process."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import tokenward
from tests.launching import launch
from tests.stages.runs import LOOKS, REINFORCE, online_recipe
from tests.tiny import make_workplace
from tests.training.engine_cases import ARGUMENTS

WITHIN = 1e-6
SPLIT = ["scores.shard_rows=4", "scores.tokens_per_batch=256"]
ONLINE = [*LOOKS, REINFORCE, "online.sampling.batch=4", "scores.tokens_per_batch=256"]

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from tests.training.engine_cases import exchange_by_gloo, shard_on_cpu
import tokenward

torch.set_num_threads(1)
given = json.loads(Path("given.json").read_text())
exchange_by_gloo() if given["engine"] == "zero3" else shard_on_cpu()
tokenward.run("recipes/quickstart.yaml", ["run=runs/parts", *given["pairs"]], quiet=True, last="policy")
tokenward.run("online.yaml", ["run=runs/loop-parts", *given["loop"]], quiet=True, last="online")
"""


def trained(sizes: dict[str, int], **more: object) -> list[str]:
    """Changes of the trainings of some stages, with rows in a batch. Plain descent: Adam makes a whole step of a gradient that is nearly 0."""
    table = {"optim": "sgd", "learning_rate": 0.01, **more}
    return [
        f"{stage}.training={json.dumps({**table, 'per_device_train_batch_size': size})}"
        for stage, size in sizes.items()
    ]


PAIRS, LOOP = {"oracle": 4, "policy": 4}, {"online": 2, "reward": 4}


def halves(sizes: dict[str, int]) -> dict[str, int]:
    return {stage: size // 2 for stage, size in sizes.items()}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_the_models_are_those_of_one_process(
    engine: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine == "zero3":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    folder = tmp_path / "work"
    make_workplace(folder, tiny_folder)
    online_recipe(folder, tiny_folder)
    monkeypatch.chdir(folder)
    tokenward.run(
        "recipes/quickstart.yaml", ["run=runs/one", *SPLIT, *trained(PAIRS)], quiet=True, last="policy"
    )
    tokenward.run("online.yaml", ["run=runs/loop", *ONLINE, *trained(LOOP)], quiet=True, last="online")
    pairs, loop = (trained(halves(sizes), **ARGUMENTS[engine]) for sizes in (PAIRS, LOOP))
    given = {"engine": engine, "pairs": [*SPLIT, *pairs], "loop": [*ONLINE, *loop]}
    Path("given.json").write_text(json.dumps(given))
    Path("two.py").write_text(SCRIPT)
    ended = launch(["two.py"], folder)
    assert [one.status for one in ended] == [0, 0], "\n".join(one.err[-3000:] for one in ended)
    for alone, parts in (("one", "parts"), ("loop", "loop-parts")):
        files = sorted(Path("runs", alone).glob("*/model/*.safetensors")) + sorted(
            Path("runs", alone).glob("online/reward/*.safetensors")
        )
        assert len(files) == (2 if alone == "one" else 3)
        for file in files:
            mine, theirs = load_file(file), load_file(Path("runs", parts, *file.parts[2:]))
            assert mine.keys() == theirs.keys()
            assert max(float((mine[name] - theirs[name]).abs().max()) for name in mine) < WITHIN, file
