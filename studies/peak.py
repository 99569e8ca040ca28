"""Peak memory of a policy's training, in a process of its own: a study's process still holds memory of earlier policies.

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
"""The second one has the optimizer's state; the rows of an arm's first updates are those of every arm."""


def peak_bytes(folder: Path, outcome: Outcome) -> int:
    """What a training takes beyond the bare process, now or as it was measured before.

    Args:
        folder: Of what was measured.
        outcome: Of the arm; its run must be there where the peak was not measured yet.
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
    """Train the policy of a run whose scores are there, and print its peak."""
    recipe, *changes = sys.argv[1:]
    run = open_run(recipe, changes, quiet=True)
    bare = status_bytes("RssAnon")["RssAnon"]
    with AnonymousPeak() as memory:
        carry_out(run, "policy")
    print(memory.peak - bare)


if __name__ == "__main__":
    main()
