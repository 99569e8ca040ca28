"""What a process knows about its launch, and what processes tell one another."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

from tests.launching import launch, of_srun
from tokenward import distributed
from tokenward.artifacts import DamagedFiles
from tokenward.distributed import Place, place_of, slurm_address
from tokenward.errors import UserError
from tokenward.scoring.reads import MissingValue

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "16",
}


def test_each_launcher_says_the_place():
    assert place_of({}) == Place()
    assert place_of(TORCHRUN) == Place(3, 4, 1)
    assert place_of(SRUN) == Place(5, 8, 1)
    assert place_of(SRUN | TORCHRUN) == Place(3, 4, 1)
    assert place_of({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}) == Place(1, 2, 1)
    # A batch script outside of srun: one process, whatever the job asked for.
    assert place_of({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}) == Place()


def test_processes_of_a_slurm_step_meet_on_its_first_machine():
    for nodes, first in {
        "node[003-007,012],other": "node003", "a1,a2": "a1", "gpu-2": "gpu-2", "r[1-2]n[3,5]": "r1n3",
    }.items():  # fmt: skip
        found = slurm_address({"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "1"})
        assert found == {"MASTER_ADDR": first, "MASTER_PORT": str(10000 + 77 * 31 + 1)}


def test_one_process_touches_no_group(monkeypatch):
    monkeypatch.setattr("torch.distributed.barrier", None)
    monkeypatch.setattr("torch.distributed.init_process_group", None)
    assert distributed.gather(3) == [3]
    assert distributed.first_alone(lambda: 4) == 4
    assert distributed.together(lambda: 5) == [5]
    assert [*distributed.split("abc", str.upper)] == ["A", "B", "C"]
    assert distributed.any_of(True)
    assert distributed.agree("x", "the recipe") == "x"
    for nothing in (distributed.start, distributed.wait_for_all, distributed.end):
        nothing()


def test_help_needs_no_torch():
    code = "import sys, tokenward.distributed as d; d.place(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


TALK = """
import json, time
from tokenward import distributed as d
from tokenward.errors import UserError

rank = d.place().rank
said = {"place": [rank, d.place().count, d.place().local], "gathered": d.gather(rank * 10), "any": [d.any_of(rank == 1), d.any_of(False)]}

def fails(error, on):
    if rank == on:
        time.sleep(0.2)
        raise error
    return rank

def caught(call):
    try:
        return call()
    except Exception as error:
        return [type(error).__name__, str(error), getattr(error, "code", ""), getattr(error, "key", "")]

wrong = UserError("no such file", code="missing-file", key="data.source")
said["first"] = caught(lambda: d.first_alone(lambda: ["from", rank]))
said["all"] = caught(lambda: d.together(lambda: rank + 5))
said["mistake of the first"] = caught(lambda: d.first_alone(lambda: fails(wrong, 0)))
said["mistake of the second"] = caught(lambda: d.together(lambda: fails(wrong, 1)))
said["error of the first"] = caught(lambda: d.first_alone(lambda: fails(ZeroDivisionError("by zero"), 0)))
said["error of the second"] = caught(lambda: d.together(lambda: fails(ZeroDivisionError("by zero"), 1)))
said["split"] = [list(d.split(range(n), lambda i: [i, rank], at_once=2)) for n in (0, 1, 5, 8)]
said["inside"] = [d.first_alone(lambda: [d.gather(rank), d.first_alone(lambda: rank)]), d.together(d.alone)]
said["agreed"] = caught(lambda: d.agree("same", "the recipe"))
said["differs"] = caught(lambda: d.agree(rank, "the recipe"))
d.end()
print(json.dumps(said))
"""


def test_what_one_process_does_or_fails_reaches_all(tmp_path):
    ended = launch(["-c", TALK], tmp_path, by=of_srun)
    assert [process.status for process in ended] == [0, 0], ended
    first, second = (json.loads(process.out) for process in ended)
    assert (first.pop("place"), second.pop("place")) == ([0, 2, 0], [1, 2, 1])
    expected = {
        "gathered": [0, 10],
        "any": [True, False],
        "first": ["from", 0],
        "all": [5, 6],
        "mistake of the first": ["UserError", "no such file", "missing-file", "data.source"],
        "mistake of the second": ["UserError", "no such file", "missing-file", "data.source"],
        "agreed": "same",
        # Item by item to one process after the other; where one has none left, the last item is done in vain.
        "split": [[[i, i % 2] for i in range(n)] for n in (0, 1, 5, 8)],
        "inside": [[[0], 0], [True, True]],
    }
    for found in (first, second):
        assert {name: found[name] for name in expected} == expected
        assert found["differs"][2] == "processes-differ"
        assert "0 in process 0, 1 in process 1" in found["differs"][1]
    own, told = ["ZeroDivisionError", "by zero", "", ""], "ZeroDivisionError: by zero"
    assert first["error of the first"] == second["error of the second"] == own
    assert second["error of the first"] == ["ElsewhereError", f"process 0 of 2: {told}", "", ""]
    assert first["error of the second"] == ["ElsewhereError", f"process 1 of 2: {told}", "", ""]


FAILS_IN_TRAINING = """
import torch
from tokenward import distributed as d

d.end_with_others()
d.start()
try:
    if d.place().rank == 1:
        raise ValueError("a bug")
    torch.distributed.all_reduce(torch.zeros(1))
except ValueError as error:
    d.leave_for(error)
    raise
"""


def test_a_process_that_fails_ends_one_that_waits_for_it_in_torch(tmp_path):
    ended = launch(["-c", FAILS_IN_TRAINING], tmp_path)
    assert [process.status for process in ended] == [1, 1], ended
    assert ended[0].err.strip() == "error: process 1 of 2: ValueError: a bug"
    assert "Traceback" in ended[1].err
    assert "This was process 1 of 2." in ended[1].err


def test_every_mistake_reaches_other_processes_as_it_is():
    for error in (
        UserError("no file", code="missing-file", key="data.source"),
        MissingValue("reward", "there is no reward"),
        DamagedFiles(Path("run/scores"), "scores", {"tokens-00000.parquet": "is missing"}),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert (str(again), vars(again)) == (str(error), vars(error))
