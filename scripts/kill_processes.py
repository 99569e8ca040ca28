"""Kill one of two processes of a run at random moments, run the same command again, and compare with a run that nobody killed.

    python -m scripts.kill_processes --kills 20 --output kills.json

The runs are a SePO and a TLM recipe on a tiny model, started by torchrun on the CPU. A kill is a SIGKILL, up to a second and
a half after a random stage has begun; torchrun ends the other process. A run is killed several times before it may end. Then
every score, weight, reply and figure must be equal, bit for bit.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tests.launching import environment, torchrun
from tests.stages.runs import EXAMPLES, write_examples
from tests.tiny import TINY_RECIPE, planted_rows, save_tiny

LONGEST_DELAY = 1.5
"""Seconds between the begin of a stage and a kill in it, at most."""

SAVES = "save_strategy: steps, save_steps: 2, "
"""Short trainings write no checkpoints, and a killed one would only begin again."""

RECIPES = {
    "sepo": TINY_RECIPE.replace("training: {{", f"training: {{{{{SAVES}") + "scores: {{shard_rows: 4}}\n",
    "tlm": EXAMPLES.replace("max_steps: 6", f"{SAVES}max_steps: 6") + "seed: 2\n",
}
STAGES = {
    "sepo": ("data", "reference", "oracle", "scores", "policy", "evaluation"),
    "tlm": ("examples", "online", "evaluation"),
}


class Kill(NamedTuple):
    """A kill.

    Attributes:
        recipe: The recipe.
        stage: The stage that had begun.
        rank: The process.
        delay: Seconds from the begin of the stage.
        at: What of the run was there.
        status: With which the launcher ended; 0 if it was done before.
        seconds: From the kill until the launcher had ended.
    """

    recipe: str
    stage: str
    rank: int
    delay: float
    at: list[str]
    status: int
    seconds: float


def make_folder(folder: Path) -> None:
    """Write the model, the data and the recipes."""
    folder.mkdir(parents=True, exist_ok=True)
    model = save_tiny(folder / "model")
    rows = (json.dumps(row) + "\n" for row in planted_rows(24))
    (folder / "pairs.jsonl").write_text("".join(rows))
    write_examples(folder / "examples.jsonl")
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(text.format(model=model))


class Job(NamedTuple):
    """A run.

    Attributes:
        folder: The current folder of its processes.
        recipe: Its recipe in the folder.
        name: Its folder in ``runs``.
        changes: Changes of the recipe.
    """

    folder: Path
    recipe: str
    name: str
    changes: Sequence[str] = ()

    @property
    def home(self) -> Path:
        """The run's folder."""
        return self.folder / "runs" / self.name

    @property
    def log(self) -> Path:
        """What its processes print."""
        return self.folder / f"{self.name}.txt"


def start(job: Job) -> subprocess.Popen[bytes]:
    """Start a run in two processes."""
    folder, log = job.folder, job.log
    changes = [f"--set={change}" for change in (f"run=runs/{job.name}", *job.changes)]
    command = torchrun("-m", "tokenward", "run", job.recipe, *changes)
    with log.open("ab") as out:
        return subprocess.Popen(command, cwd=folder, env=environment(), stdout=out, stderr=subprocess.STDOUT)


def finish(job: Job) -> None:
    """Carry a run out to its end.

    Raises:
        RuntimeError: it fails.
    """
    if status := start(job).wait():
        raise RuntimeError(f"{job.name} ended with status {status}:\n{job.log.read_text()[-5000:]}")


def kill(job: Job, stage: str, rank: int, delay: float) -> Kill:
    """Start a run, and kill one of its processes after a stage has begun."""
    since = job.log.stat().st_size if job.log.is_file() else 0
    launcher = start(job)
    while launcher.poll() is None and not _begun(job, stage, since):
        time.sleep(0.02)
    time.sleep(delay)
    there = sorted(path.parent.name for path in job.home.glob("*/manifest.json"))
    for process in _workers(launcher.pid, rank):
        os.kill(process, signal.SIGKILL)
    killed = time.monotonic()
    status = launcher.wait()
    return Kill(job.recipe, stage, rank, round(delay, 3), there, status, round(time.monotonic() - killed, 2))


def _begun(job: Job, stage: str, since: int) -> bool:
    """Whether this start of the run has shown the heading of a stage, done or not. torchrun's processes write at once."""
    return f"\n{stage}" in job.log.read_bytes()[since:].decode(errors="replace")


def _workers(launcher: int, rank: int) -> Iterator[int]:
    """Process ids of a rank's process."""
    try:
        for child in psutil.Process(launcher).children():
            if child.environ().get("RANK") == str(rank):
                yield child.pid
    except psutil.NoSuchProcess:  # it has ended
        return


def made(home: Path) -> dict[str, str]:
    """A hash of every score, weight, reply and figure of a run, by file."""
    patterns = ("*/tokens-*.parquet", "**/model/*.safetensors", "online/reward/*.safetensors", "**/samples.jsonl",
                "evaluation/metrics.json", "evaluation/rows.jsonl")  # fmt: skip
    files = sorted({path for pattern in patterns for path in home.glob(pattern)})
    return {
        str(path.relative_to(home)): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in files
        if "checkpoints" not in path.parts
    }


def differences(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Files that are not equal, or not in both."""
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


def try_kills(job: Job, kills: Sequence[tuple[str, int, float]], whole: dict[str, str]) -> dict[str, Any]:
    """Kill a run several times, let it end, and compare it with one that nobody killed."""
    found = [kill(job, *item)._asdict() for item in kills]
    finish(job)
    return {"run": job.name, "kills": found, "differs": differences(whole, made(job.home))}


def main() -> None:
    """Do all kills; ends with status 1 if a run differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--per-run", type=int, default=5)
    parser.add_argument("--recipes", nargs="+", choices=[*RECIPES], default=[*RECIPES])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    draw, results = random.Random(given.seed), []
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        folder = Path(name)
        make_folder(folder)
        whole = {}
        for recipe in given.recipes:
            job = Job(folder, f"{recipe}.yaml", f"{recipe}-whole")
            finish(job)
            whole[recipe] = made(job.home)
        for number in range(-(-given.kills // given.per_run)):
            recipe = given.recipes[number % len(given.recipes)]
            count = min(given.per_run, given.kills - number * given.per_run)
            # In the order of the stages, so that a stage that is done is not waited for in vain.
            stages = sorted(draw.choices(STAGES[recipe], k=count), key=STAGES[recipe].index)
            kills = [(stage, draw.randrange(2), draw.uniform(0, LONGEST_DELAY)) for stage in stages]
            job = Job(folder, f"{recipe}.yaml", f"{recipe}-{number}")
            result = try_kills(job, kills, whole[recipe])
            results.append(result)
            print(json.dumps(result), flush=True)
            shutil.rmtree(job.home)
    if given.output is not None:
        given.output.write_text(json.dumps(results, indent=1) + "\n")
    killed = [item for result in results for item in result["kills"] if item["status"]]
    wrong = [result["run"] for result in results if result["differs"]]
    print(f"{len(killed)} processes were killed; runs that differ: {', '.join(wrong) or 'none'}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
