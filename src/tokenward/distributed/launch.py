"""Which of how many processes this one is, as launchers say it in the environment."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any


@dataclass(frozen=True)
class Place:
    """Which of how many processes this one is.

    Attributes:
        rank: Its number, from 0.
        count: Number of processes.
        local: Its number on its machine.
    """

    rank: int = 0
    count: int = 1
    local: int = 0


_NAMES = (
    ("WORLD_SIZE", "RANK", "LOCAL_RANK"),  # torchrun, accelerate launch
    (
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ),  # these are accelerate's names
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
)


def place_of(environment: Mapping[str, str]) -> Place:
    """The place that a launcher has written into the environment. torchrun inside of ``srun`` has the last word.

    In a batch script, outside of ``srun``, Slurm sets the number of tasks too, but starts one process only.
    """
    for size, rank, local in _NAMES:
        if environment.get(size) and environment.get(rank):
            number = int(environment[rank])
            return Place(number, int(environment[size]), int(environment.get(local) or number))
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        count = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or "1"
        return Place(int(environment["SLURM_PROCID"]), int(count), int(environment.get("SLURM_LOCALID", "0")))
    return Place()


def slurm_address(environment: Mapping[str, str]) -> dict[str, str]:
    """Where the processes of a Slurm step meet: the first machine, and a port that depends on job and step only."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or "localhost"
    # node[003-007,012],other -> node003
    first = re.sub(r"\[([^],-]*)[^]]*\]", r"\1", nodes).split(",")[0]
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return {"MASTER_ADDR": first, "MASTER_PORT": str(10000 + (job * 31 + step) % 20000)}


@dataclass
class Links:
    """What this process has opened to the others."""

    place: Place | None = None
    group: Any = None
    watch: Any = None
    ends_with_others: bool = False
    inside: bool = False


links = Links()


def place() -> Place:
    """This process's place; fixed when it is first asked for."""
    if links.place is None:
        links.place = place_of(os.environ)
    return links.place


def alone() -> bool:
    """Whether this process has nobody to share its present work with."""
    return place().count == 1 or links.inside


def is_first() -> bool:
    """Whether this process does what is not parallel, and talks to the user."""
    return place().rank == 0


def work_alone() -> None:
    """Take this process for the only one: for work that is not parallel, and for jobs that share nothing but files."""
    links.place = Place()
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE", *chain.from_iterable(_NAMES)):
        os.environ.pop(name, None)  # accelerate would wait for the other processes


@contextmanager
def independent() -> Iterator[None]:
    """A context in which this process works as if it were the only one."""
    before, links.inside = links.inside, True
    try:
        yield
    finally:
        links.inside = before


def not_started() -> int:
    """The number of processes that ``accelerate launch`` was asked for, if it has started one only, as with ``--cpu``; else 0."""
    # Its simple launcher sets the one variable, and only launchers of several processes set the other.
    if "ACCELERATE_USE_CPU" not in os.environ or place().count > 1:
        return 0
    import psutil

    with suppress(psutil.Error):
        written = " ".join(psutil.Process(os.getppid()).cmdline())
        asked = re.search(r"accelerate\S* .*--num[_-]processes[ =](\d+)", written)
        if asked is not None and int(asked[1]) > 1:
            return int(asked[1])
    return 0


def share_label(label: str) -> str:
    """The label of a progress that counts the share of the first process only."""
    return label if alone() else f"{label}, process 0 of {place().count}"
