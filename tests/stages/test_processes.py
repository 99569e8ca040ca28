"""Runs, and calls of the library, that several processes of one launch share."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import tokenward
from scripts.kill_processes import Job, made, try_kills
from tests.launching import launch, of_srun, run_torchrun
from tests.stages.runs import LOOKS, REINFORCE, events, lines, manifests, online_recipe
from tests.tiny import make_workplace
from tokenward.scoring.store import TokenStore

# Several shards, batches of replies and passes, for each process to have some.
SPLIT = ["scores.shard_rows=4", "scores.tokens_per_batch=256", "evaluation.batch=1", "tokens.processes=2"]
HALF = [f"{stage}.training.per_device_train_batch_size=2" for stage in ("oracle", "policy")]
ONLINE = [*LOOKS, REINFORCE, "online.sampling.batch=4", "scores.tokens_per_batch=256"]
HALF_ONLINE = [
    "online.training.per_device_train_batch_size=1",
    "reward.training.per_device_train_batch_size=2",
]

OWN = [
    *SPLIT, "scores.scorer={name: reward}",
    "reward={head: {hidden: 16, gain: 0.5}, training: {max_steps: 2, learning_rate: 1.0e-3, per_device_train_batch_size: 4}}",
    "policy={selection: {name: all}, objective: {name: reinforce, entropy: 0.0, kl: 0.1}, rollouts: 3, "
    "sampling: {max_new_tokens: 6, batch: 4}, training: {max_steps: 3, learning_rate: 1.0e-3, per_device_train_batch_size: 2}}",
]  # fmt: skip
HALF_OWN = ["reward.training.per_device_train_batch_size=2", "policy.training.per_device_train_batch_size=1"]

SCRIPT = """
import json, sys
from pathlib import Path
import tokenward

given = json.loads(Path("given.json").read_text())
tokenward.run("recipes/quickstart.yaml", ["run=runs/again", *given["split"]])
tokenward.run("recipes/quickstart.yaml", ["run=runs/two", *given["split"], *given["half"]], quiet=True)
tokenward.run("online.yaml", ["run=runs/online-two", *given["online"], *given["half_online"]], quiet=True)
tokenward.run("recipes/quickstart.yaml", ["run=runs/own-two", *given["own"], *given["half_own"]], last="policy", quiet=True)
rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
oracle = "runs/again/oracle"
scored = tokenward.score(rows, oracle=oracle, tokens_per_batch=256)
kept = tokenward.score(rows, oracle=oracle, tokens_per_batch=256, store="kept")
figures = tokenward.evaluate(
    "runs/again/policy/model", rows[:6], reference=given["model"], oracle=oracle, prompts=3,
    sampling=tokenward.SamplingSettings(max_new_tokens=4, batch=1), bootstrap=20, tokens_per_batch=256, quiet=True,
)
from tokenward.distributed import place
Path(f"library-{place().rank}.json").write_text(json.dumps(
    {"scored": scored.to_list(), "kept": kept.to_list(), "figures": {k: v._asdict() for k, v in figures.items()}}
))
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A folder with runs of one process, and the same work done by two."""
    folder = tmp_path_factory.mktemp("processes") / "work"
    make_workplace(folder, tiny_folder)
    online_recipe(folder, tiny_folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tokenward.run("recipes/quickstart.yaml", ["run=runs/one", *SPLIT], quiet=True)
        tokenward.run("online.yaml", ["run=runs/online", *ONLINE], quiet=True)
        tokenward.run("recipes/quickstart.yaml", ["run=runs/own", *OWN], last="policy", quiet=True)
        # The same models, and everything that is computed from them anew.
        shutil.copytree("runs/one", "runs/again")
        for stage in ("encoded", "pairs", "reference", "scores", "evaluation"):
            shutil.rmtree(f"runs/again/{stage}")
        given = {
            "split": SPLIT, "half": HALF, "online": ONLINE, "half_online": HALF_ONLINE,
            "own": OWN, "half_own": HALF_OWN, "model": str(tiny_folder),
        }  # fmt: skip
        Path("given.json").write_text(json.dumps(given))
        Path("script.py").write_text(SCRIPT)
        ended = run_torchrun("script.py", folder=folder)
        assert ended.status == 0, ended
        Path("out.txt").write_text(ended.out)
    return folder


def shards(run: Path, stage: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / stage).glob("tokens-*")}


def figures(run: Path) -> dict[str, dict[str, float]]:
    return json.loads((run / "evaluation" / "metrics.json").read_text())


def largest_difference(first: Path, second: Path) -> float:
    one, two = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def check_figures(one: dict, two: dict, within: float) -> None:
    assert one.keys() == two.keys()
    for name, figure in one.items():
        np.testing.assert_allclose(list(two[name].values()), list(figure.values()), atol=within, err_msg=name)


def test_with_the_same_models_every_byte_is_that_of_one_process(shared: Path) -> None:
    one, again = shared / "runs/one", shared / "runs/again"
    for stage in ("reference", "scores"):
        assert len(shards(one, stage)) == 6
        assert shards(again, stage) == shards(one, stage), stage
    for name in ("metrics.json", "rows.jsonl", "samples.jsonl"):
        assert (again / "evaluation" / name).read_bytes() == (one / "evaluation" / name).read_bytes(), name
    before, after = manifests(one), manifests(again)
    for stage in ("oracle", "policy"):
        assert after[stage] == before[stage]
    assert not [*again.rglob("cache")]


def test_a_run_that_two_processes_train_is_that_of_one(shared: Path) -> None:
    one, two = shared / "runs/one", shared / "runs/two"
    assert shards(two, "reference") == shards(one, "reference")
    for stage in ("oracle", "policy"):
        assert largest_difference(one / stage / "model", two / stage / "model") < 1e-6, stage
    selected = [lines(run / "policy" / "history.jsonl")[-2] for run in (one, two)]
    stores = [TokenStore(run / "scores") for run in (one, two)]
    for key in stores[0]:
        np.testing.assert_allclose(
            stores[1][key].values["oracle_logp"], stores[0][key].values["oracle_logp"], atol=1e-4
        )
    kept = [json.loads((run / "policy/manifest.json").read_text())["facts"]["kept"] for run in (one, two)]
    assert kept[0] == kept[1]
    assert selected[0]["step"] == selected[1]["step"]
    check_figures(figures(one), figures(two), 1e-4)
    assert (two / "evaluation/samples.jsonl").read_bytes() == (one / "evaluation/samples.jsonl").read_bytes()


def test_the_sampled_loop_of_two_processes_is_that_of_one(shared: Path) -> None:
    one, two = shared / "runs/online", shared / "runs/online-two"
    for part in ("model", "reward"):
        assert largest_difference(one / "online" / part, two / "online" / part) < 1e-6, part
    assert len(events(one)) == len(events(two)) > 4
    for first, second in zip(events(one), events(two), strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert second[name] == (pytest.approx(value, abs=1e-5) if isinstance(value, float) else value), (
                name
            )
    for name in ("online/samples.jsonl", "evaluation/samples.jsonl"):
        assert (two / name).read_bytes() == (one / name).read_bytes(), name
    check_figures(figures(one), figures(two), 1e-5)


def test_a_policy_that_two_processes_train_on_its_own_replies_is_that_of_one(shared: Path) -> None:
    one, two = shared / "runs/own", shared / "runs/own-two"
    for stage in ("reward", "policy"):
        assert largest_difference(one / stage / "model", two / stage / "model") < 1e-6, stage


def test_calls_in_a_script_give_every_process_the_result_of_one(shared: Path, monkeypatch) -> None:
    monkeypatch.chdir(shared)
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    scored = tokenward.score(rows, oracle="runs/again/oracle", tokens_per_batch=256, quiet=True).to_list()
    for rank in (0, 1):
        found = json.loads((shared / f"library-{rank}.json").read_text())
        assert found["scored"] == found["kept"] == scored
        assert found["figures"].keys() >= {"preference/accuracy", "kl/per_token", "credit/auroc/log_ratio"}
        assert found == json.loads((shared / "library-0.json").read_text())


def test_one_process_speaks(shared: Path) -> None:
    said = (shared / "out.txt").read_text()
    assert said.count("what training changed, on eval rows") == said.count("report: ") == 1
    assert "scores, process 0 of 2 24/24" in said  # of 48 responses


FAILING = """
import os
from tokenward.errors import UserError

class Scorer:
    reads = ("oracle_logp", "reference_logp")

    def __call__(self, record):
        if os.environ["RANK"] == "1":
            raise UserError("no such colour")
        return record.value("oracle_logp") - record.value("reference_logp")
"""


def test_an_error_in_one_process_ends_all(shared: Path) -> None:
    """A scorer that fails in the second one while the first one goes on, and data that only the first one reads."""
    command = ["-m", "tokenward", "run", "recipes/quickstart.yaml"]
    shutil.copytree(shared / "runs/again", shared / "runs/mine")
    (shared / "lab_mine.py").write_text(FAILING)
    changes = [
        f"--set={change}" for change in ("run=runs/mine", "scores.scorer={name: lab_mine:Scorer}", *SPLIT)
    ]
    ended = launch([*command, *changes], shared, by=of_srun)
    assert [process.status for process in ended] == [2, 2], ended
    assert "error: in process 1: no such colour" in ended[0].err
    assert not ended[1].out
    assert "colour" not in ended[1].err

    (shared / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    ended = launch([*command, "--set=data.source=bad.jsonl", "--set=run=runs/bad"], shared)
    assert [process.status for process in ended] == [2, 2], ended
    assert "error: bad.jsonl:1" in ended[0].err
    assert not ended[1].err + ended[1].out


@pytest.mark.slow
def test_a_run_of_which_a_process_is_killed_twice_ends_as_one_that_nobody_killed(shared: Path) -> None:
    saves = [
        f"{stage}.training.{key}"
        for stage in ("oracle", "policy")
        for key in ("save_strategy=steps", "save_steps=2")
    ]
    job = Job(shared, "recipes/quickstart.yaml", "killed", [*SPLIT, *HALF, *saves])
    result = try_kills(job, [("oracle", 1, 0.5), ("policy", 0, 0.5)], made(shared / "runs/two"))
    assert not result["differs"]
    assert all(kill["status"] for kill in result["kills"])
