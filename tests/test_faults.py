"""A little of the fault bench: work that is killed or whose files change ends equal or with a clear error."""

import subprocess
import sys

from tests.launching import ROOT, environment


def test_disturbed_work_ends_equal_or_says_why() -> None:
    counts = ["--kills=1", "--disks=0", "--mutations=2", "--kinds", "sepo"]
    command = [sys.executable, "-m", "scripts.faults", *counts]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "kills: 1 tried" in done.stdout
    assert "mutations: 2 tried" in done.stdout
    assert "\n0 faults" in done.stdout
