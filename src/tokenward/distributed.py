"""The processes that torchrun, ``accelerate launch`` or ``srun`` started for one run, and what they tell one another.

accelerate's ``PartialState`` joins them. The shell's own messages go through a second group, on gloo and almost without a
limit of time: a process may wait for hours while the first one reads data, and no timeout of NCCL may end that. One
process alone never touches ``torch.distributed``. torch is imported by :func:`start`, so that help stays fast.

Every process must make the same calls in the same order, as everywhere under these launchers.
"""

import atexit
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

from tokenward.errors import UserError

T = TypeVar("T")

LIMIT = timedelta(days=30)
"""How long a process waits for the others. What ends a wait is an error, or the launcher."""

GRACE = 5.0
"""Seconds that a process has to end by itself when another one has failed."""

_POLL = 0.5
_FAILED, _SAID = "failed", "said"


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


class ElsewhereError(Exception):
    """Another process has failed, with an error that is not the user's; that process shows it."""


def place_of(environment: Mapping[str, str]) -> Place:
    """The place that a launcher has written into the environment. torchrun inside of ``srun`` has the last word.

    In a batch script, outside of ``srun``, Slurm sets the number of tasks too, but starts one process only.
    """
    if environment.get("WORLD_SIZE") and environment.get("RANK"):
        rank = int(environment["RANK"])
        return Place(rank, int(environment["WORLD_SIZE"]), int(environment.get("LOCAL_RANK") or rank))
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
class _Links:
    """What this process has opened to the others."""

    place: Place | None = None
    group: Any = None
    watch: "_Watch | None" = None


_links = _Links()


def place() -> Place:
    """This process's place; fixed when it is first asked for."""
    if _links.place is None:
        _links.place = place_of(os.environ)
    return _links.place


def alone() -> bool:
    """Whether this is the only process."""
    return place().count == 1


def is_first() -> bool:
    """Whether this process does what is not parallel, and talks to the user."""
    return place().rank == 0


def work_alone() -> None:
    """Take this process for the only one: for jobs that share nothing but files, such as parts of the scores."""
    _links.place = Place()


def start(*, cpu: bool | None = None) -> None:
    """Join the other processes, if there are some; a second call does nothing.

    Args:
        cpu: Whether the models are on the CPU; None if this machine has no accelerator.
    """
    if alone() or _links.group is not None:
        return
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    if not dist.is_initialized():
        _tell_torch()
        on_cpu = not torch.accelerator.is_available() if cpu is None else cpu
        PartialState(cpu=on_cpu, **({"timeout": LIMIT} if on_cpu else {}))
    if dist.get_world_size() != place().count:
        raise UserError(
            f"the launcher started {place().count} processes, but torch.distributed has joined {dist.get_world_size()}. Start all of them "
            "with one command.",
            code="processes-differ",
        )
    _links.group = dist.new_group(backend="gloo", timeout=LIMIT)
    atexit.register(_part)


def _part() -> None:
    """Close the groups: torch aborts where their threads still run when Python ends."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _tell_torch() -> None:
    """Set the variables that torch reads, which ``srun`` does not set."""
    here = place()
    known = {"RANK": here.rank, "WORLD_SIZE": here.count, "LOCAL_RANK": here.local}
    if "RANK" not in os.environ:
        for name, value in slurm_address(os.environ).items():
            os.environ.setdefault(name, value)
    os.environ.update({name: str(value) for name, value in known.items()})
    os.environ.setdefault("MASTER_ADDR", "localhost")


def gather(value: T) -> list[T]:
    """The values of all processes, in the order of their ranks. Values are pickled."""
    if alone():
        return [value]
    import torch.distributed as dist

    _meet()
    found: list[Any] = [None] * place().count
    dist.all_gather_object(found, value, group=_links.group)
    return found


def wait_for_all() -> None:
    """Wait until every process is here."""
    if not alone():
        _meet()


def _meet() -> None:
    """Wait for the others in a way that a signal can end."""
    import torch.distributed as dist

    start()
    work = dist.barrier(group=_links.group, async_op=True)
    assert work is not None
    pause = 0.0005
    while not work.is_completed():
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    work.wait()


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return any(gather(flag))


def agree(value: T, what: str) -> T:
    """The value, which must be equal in all processes.

    Raises:
        UserError: it differs.
    """
    found = gather(value)
    if other := next((rank for rank, item in enumerate(found) if item != found[0]), 0):
        raise UserError(
            f"{what} differs between the processes: {found[0]} in process 0, {found[other]} in process {other}. Give every process "
            "the same command, files and versions.",
            code="processes-differ",
        )
    return value


class _Outcome(NamedTuple):
    """What some work led to in one process: a value, a mistake of the user, or the text of another error."""

    value: Any = None
    mistake: UserError | None = None
    error: str = ""


def _tried(work: Callable[[], Any]) -> tuple[_Outcome, Exception | None]:
    """The outcome of some work, and its error. Other processes hear of an error at once."""
    try:
        return _Outcome(work()), None
    except UserError as error:
        announce(error)
        return _Outcome(mistake=error), error
    except Exception as error:  # told to all processes, and raised again
        announce(error)
        return _Outcome(error=_named(error)), error


def _named(error: BaseException) -> str:
    here = place()
    return f"process {here.rank} of {here.count}: {type(error).__name__}: {error}"


def first_alone(work: Callable[[], T]) -> T:
    """Do some work in the first process only; its result, or its error, reaches all. The result is pickled.

    Raises:
        UserError: the work raised it.
        ElsewhereError: the work raised another error, in a process that is not this one.
    """
    if alone():
        return work()
    outcome, error = _tried(work) if is_first() else (_Outcome(), None)
    return _settled(gather(outcome)[:1], error)[0]


def together(work: Callable[[], T]) -> list[T]:
    """Do some work in every process, without messages between them; the results of all in the order of their ranks.

    Raises:
        UserError: the work raised it in a process; of several errors, that of the first process.
        ElsewhereError: the work raised another error, in a process that is not this one.
    """
    if alone():
        return [work()]
    outcome, error = _tried(work)
    return _settled(gather(outcome), error)


def _settled(outcomes: list[_Outcome], own: Exception | None) -> list[Any]:
    failed = next((item for item in outcomes if item.mistake is not None or item.error), None)
    if failed is None:
        return [item.value for item in outcomes]
    if own is not None:
        raise own
    raise failed.mistake if failed.mistake is not None else ElsewhereError(failed.error)


def watch() -> None:
    """End this process, from now on, when another one has failed. For commands: a script of the user's is not ended."""
    if alone() or _links.watch is not None:
        return
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  public in torch's docs

    start()
    host = "localhost" if is_first() else os.environ.get("MASTER_ADDR", "localhost")
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False) if is_first() else None
    port = gather(0 if store is None else store.port)[0]
    # A thread of its own must not wait for what this one asks.
    mine, ears = (TCPStore(host, port, is_master=False) for _ in range(2))
    _links.watch = _Watch(mine, ears, store)
    wait_for_all()


def announce(error: BaseException, status: int = 1) -> None:
    """Tell the other processes that this one has failed, if they listen; of several errors, the first one counts."""
    if _links.watch is not None:
        text, status = (str(error), 2) if isinstance(error, UserError) else (_named(error), status)
        _links.watch.fail(text, status)


def tells(error: BaseException, status: int = 1) -> bool:
    """Whether this process has to tell the user of the error that ends it: the first one does, or nobody else would."""
    if _links.watch is None:
        return is_first() or not isinstance(error, ElsewhereError)
    announce(error, status)
    if is_first():
        _links.watch.said()
        return True
    return not _links.watch.was_said(2 * GRACE)


def end() -> None:
    """End well: nobody listens to the first process any more when it ends."""
    if _links.watch is not None:
        wait_for_all()
        _links.watch.stop()
        wait_for_all()


class _Watch:
    """Ends this process when another one has failed and this one cannot know, for example inside of a collective.

    Args:
        store: torch's store, in which a process that fails leaves its message.
        ears: Another connection to it, for the thread that listens.
        server: What keeps the store, in the first process.
    """

    def __init__(self, store: Any, ears: Any, server: Any) -> None:
        self._store, self._ears, self._server = store, ears, server
        self._stop = threading.Event()
        threading.Thread(target=self._listen, daemon=True, name="tokenward-watch").start()

    def stop(self) -> None:
        """Stop listening."""
        self._stop.set()

    def fail(self, text: str, status: int) -> None:
        """Leave a message for the others. The first one stays."""
        with suppress(RuntimeError):  # the process that keeps the store has ended
            self._store.compare_set(_FAILED, "", f"{place().rank} {status} {text}")

    def said(self) -> None:
        """Note that the user has been told."""
        with suppress(RuntimeError):
            self._store.set(_SAID, "1")

    def was_said(self, seconds: float) -> bool:
        """Whether another process tells the user within some seconds."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with suppress(RuntimeError):
                if self._store.check([_SAID]):
                    time.sleep(
                        2 * _POLL
                    )  # until the first process has ended: it would see this one leave as an error
                    return True
            time.sleep(_POLL / 5)
        return False

    def _listen(self) -> None:
        while not self._stop.wait(_POLL):
            try:
                if self._ears.check([_FAILED]):
                    rank, status, text = self._ears.get(_FAILED).decode().split(" ", 2)
                    break
            except RuntimeError:
                rank, status, text = "0", "1", f"process 0 of {place().count} has ended"
                break
        else:
            return
        if not self._stop.wait(GRACE):
            self._leave(int(rank), int(status), text)

    def _leave(self, rank: int, status: int, text: str) -> None:
        with suppress(RuntimeError):
            if is_first() and not self._ears.check([_SAID]):
                print(f"error: {text if rank == 0 else f'in process {rank}: {text}'}", file=sys.stderr)
                self._ears.set(_SAID, "1")
        time.sleep(_POLL)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
