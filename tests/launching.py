"""Starts several processes as launchers do."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Ended(NamedTuple):
    """How a process ended, and what it wrote."""

    status: int
    out: str
    err: str


def free_port() -> int:
    """A port that nobody listens to now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment(more: Mapping[str, str | int] | None = None) -> dict[str, str]:
    """The environment of a process that imports this tree, without a launcher's variables."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "SLURM_", "TORCHELASTIC_", "ACCELERATE_")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    path = os.pathsep.join((str(ROOT / "src"), str(ROOT)))
    given = {name: str(value) for name, value in (more or {}).items()}
    return {**plain, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **given}


def of_torchrun(rank: int, count: int, port: int) -> dict[str, str | int]:
    """What torchrun tells a process."""
    return {
        "RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip


def of_srun(rank: int, count: int, port: int) -> dict[str, str | int]:
    """What ``srun`` tells a process of one machine; the port follows from the job's number."""
    return {
        "SLURM_JOB_ID": port, "SLURM_STEP_ID": 0, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NTASKS": count,
        "SLURM_STEP_NUM_TASKS": count, "SLURM_STEP_NODELIST": "localhost",
    }  # fmt: skip


def torchrun(*command: str, count: int = 2) -> list[str]:
    """The command line that starts some processes of a script, or of a module after ``-m``."""
    return [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", "--master-addr=127.0.0.1",
        f"--master-port={free_port()}", *command,
    ]  # fmt: skip


def run_torchrun(*command: str, folder: Path, more: Mapping[str, str | int] | None = None) -> Ended:
    """Carry out a script in two processes of torchrun."""
    found = subprocess.run(
        torchrun(*command), env=environment(more), cwd=folder, capture_output=True, text=True, check=False
    )
    return Ended(found.returncode, found.stdout, found.stderr)


def launch(
    command: Sequence[str], folder: Path, *, count: int = 2, by=of_torchrun, seconds: float = 900
) -> list[Ended]:
    """Carry out a Python command as each of some processes. None is ended from outside, but after the limit of time."""
    port = free_port()
    logs = [(folder / f"out{rank}.txt", folder / f"err{rank}.txt") for rank in range(count)]
    started = []
    for rank, (out, err) in enumerate(logs):
        with out.open("w") as first, err.open("w") as second:
            told = environment(by(rank, count, port))
            started.append(
                subprocess.Popen(
                    [sys.executable, *command], env=told, cwd=folder, stdout=first, stderr=second
                )
            )
    until = time.monotonic() + seconds
    try:
        while any(process.poll() is None for process in started) and time.monotonic() < until:
            time.sleep(0.02)
    finally:
        hung = [rank for rank, process in enumerate(started) if process.poll() is None]
        for process in started:
            process.kill()
            process.wait()
    texts = [(out.read_text(), err.read_text()) for out, err in logs]
    assert not hung, f"processes {hung} did not end in {seconds} s: {texts}"
    return [Ended(process.returncode, *text) for process, text in zip(started, texts, strict=True)]
