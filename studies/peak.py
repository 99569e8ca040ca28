"""Peak memory of a policy's training, in a separate process, because the study's process still holds earlier memory.

python -m studies.peak RECIPE a.b=value ...     # prints bytes; studies.methods starts it
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.memory import AnonymousPeak, status_bytes
from studies.arms import Outcome, values_file
from tokenward.stages.lists import carry_out, run_through
from tokenward.tools.run import open_run

ROOT = Path(__file__).parents[1]
UPDATES = 2
"""The optimizer state exists from the second update on. All arms have the same rows in their first updates."""


def peak_bytes(folder: Path, outcome: Outcome) -> int:
    """Memory of a training beyond the process itself, measured once and then stored.

    Args:
        folder: Folder of the stored measurements.
        outcome: The arm. Its run must exist if the peak has not been measured yet.
    """
    changes = [*outcome.changes, f"policy.training.max_steps={UPDATES}"]
    file = values_file(folder, outcome.recipe, [*changes, "peak memory"])
    if not file.exists():
        print(f"{outcome.arm}, memory", flush=True)
        run = open_run(outcome.recipe, changes, quiet=True)
        run_through(run, "scores")
        command = [sys.executable, "-m", "studies.peak", outcome.recipe, *changes]
        paths = os.pathsep.join([str(ROOT), *sys.path])
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}
        )
        found = int(done.stdout.split()[-1])
        shutil.rmtree(run.path("policy"))
        record = {"recipe": outcome.recipe, "changes": changes, "peak_bytes": found}
        file.write_text(json.dumps(record) + "\n", encoding="utf-8")
    return int(json.loads(file.read_text(encoding="utf-8"))["peak_bytes"])


def main() -> None:
    """Train the policy of a run that has scores, and print its peak memory in bytes."""
    recipe, *changes = sys.argv[1:]
    run = open_run(recipe, changes, quiet=True)
    bare = status_bytes("RssAnon")["RssAnon"]
    with AnonymousPeak() as memory:
        carry_out(run, "policy")
    print(memory.peak - bare)


if __name__ == "__main__":
    main()
