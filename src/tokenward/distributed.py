"""The processes that torchrun, ``accelerate launch`` or ``srun`` started for one run, and what they tell one another.

accelerate's ``PartialState`` joins them. The shell's own messages go through a second group, on gloo and almost without a
limit of time: a process may wait for hours while the first one reads data, and no timeout of NCCL may end that. One
process alone never touches ``torch.distributed``. torch is imported by :func:`start`, so that help stays fast.

Every process must make the same calls in the same order, as everywhere under these launchers. Work that is given to
:func:`first_alone` or :func:`together` is done as if its process were alone, so what it calls need not know.
"""

import atexit
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import Any, NamedTuple, TypeVar

from tokenward.errors import UserError

S = TypeVar("S")
T = TypeVar("T")

LIMIT = timedelta(days=30)
"""How long a process waits for the others. What ends a wait is an error, or the launcher."""

LIMIT_ON_GPUS = timedelta(hours=1)
"""How long a process waits for the others in a collective of a training on GPUs."""

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
class _Links:
    """What this process has opened to the others."""

    place: Place | None = None
    group: Any = None
    watch: "_Watch | None" = None
    ends_with_others: bool = False
    inside: bool = False


_links = _Links()


def place() -> Place:
    """This process's place; fixed when it is first asked for."""
    if _links.place is None:
        _links.place = place_of(os.environ)
    return _links.place


def alone() -> bool:
    """Whether this process has nobody to share its present work with."""
    return place().count == 1 or _links.inside


def is_first() -> bool:
    """Whether this process does what is not parallel, and talks to the user."""
    return place().rank == 0


def work_alone() -> None:
    """Take this process for the only one: for work that is not parallel, and for jobs that share nothing but files."""
    _links.place = Place()
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE", *chain.from_iterable(_NAMES)):
        os.environ.pop(name, None)  # accelerate would wait for the other processes


@contextmanager
def independent() -> Iterator[None]:
    """A context in which this process works as if it were the only one."""
    before, _links.inside = _links.inside, True
    try:
        yield
    finally:
        _links.inside = before


def end_with_others() -> None:
    """End this process when another one has failed, once they have joined. For commands: a script of the user's is not ended."""
    _links.ends_with_others = True


def start() -> None:
    """Join the other processes, if there are some; a second call does nothing.

    Raises:
        UserError: the launcher and torch count them differently.
    """
    if place().count == 1 or _links.group is not None:
        return
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    if not dist.is_initialized():
        _tell_torch()
        if not torch.accelerator.is_available():
            PartialState(cpu=True, timeout=LIMIT)
        elif torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") != "true":
            # With gloo beside NCCL, because a recipe may set its device to cpu.
            PartialState(backend="cpu:gloo,cuda:nccl", timeout=LIMIT_ON_GPUS)
        else:
            PartialState(timeout=LIMIT_ON_GPUS)
    if not dist.is_initialized() or dist.get_world_size() != place().count:
        joined = dist.get_world_size() if dist.is_initialized() else 1
        raise UserError(
            f"the launcher started {place().count} processes, but torch.distributed has joined {joined}. Start all of them with one "
            "command.",
            code="processes-differ",
        )
    _links.group = dist.new_group(backend="gloo", timeout=LIMIT)
    atexit.register(_part)
    if _links.ends_with_others:
        _watch()


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
    """Wait for the others."""
    import torch.distributed as dist

    start()
    _wait_for(dist.barrier(group=_links.group, async_op=True))


def _wait_for(work: Any) -> None:
    """Wait for a collective in a way that a signal can end."""
    pause = 0.0001
    while not work.is_completed():
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    work.wait()


def mean_over(value: float) -> float:
    """The mean of a number of each process: of a sum that transformers keeps of a process's own losses, for example."""
    return sum(gather(value)) / (1 if alone() else place().count)


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process. Cheap enough for every training step."""
    if alone():
        return flag
    import torch
    import torch.distributed as dist

    start()
    found = torch.tensor([int(flag)])
    _wait_for(dist.all_reduce(found, dist.ReduceOp.MAX, group=_links.group, async_op=True))
    return bool(found.item())


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
        with independent():
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
    import torch.distributed as dist

    start()
    outcome, error = _tried(work) if is_first() else (_Outcome(), None)
    _meet()
    box = [outcome]
    dist.broadcast_object_list(box, src=0, group=_links.group)
    return _settled([outcome if is_first() else box[0]], error)[0]


@contextmanager
def first_enters(make: Callable[[], AbstractContextManager[T]]) -> Iterator[T]:
    """Enter a context in the first process only; its value reaches all.

    Raises:
        UserError: as :func:`first_alone`.
    """
    with ExitStack() as held:
        yield first_alone(lambda: held.enter_context(make()))


def together(work: Callable[[], T]) -> list[T]:
    """Do some work in every process, without messages between them; the results of all in the order of their ranks.

    Raises:
        UserError: the work raised it in a process; of several errors, that of the first process.
        ElsewhereError: the work raised another error, in a process that is not this one.
    """
    if alone():
        return [work()]
    start()
    outcome, error = _tried(work)
    return _settled(gather(outcome), error)


def split(items: Sequence[S], work: Callable[[S], T], *, at_once: int = 16) -> Iterator[T]:
    """The result of some work on each item, in the order of the items, which are split over the processes.

    An item must give the same result in every process. Results travel after ``at_once`` items of each process. A process
    that has fewer items than others does its last one again, because a model in parts needs all processes at each call.
    """
    if alone():
        yield from map(work, items)
        return
    here = place()
    for first in range(0, len(items), at_once * here.count):
        group = items[first : first + at_once * here.count]
        calls = -(-len(group) // here.count)
        numbers = [min(call * here.count + here.rank, len(group) - 1) for call in range(calls)]
        found = together(lambda: [work(group[number]) for number in numbers])  # noqa: B023  called at once
        yield from (found[number % here.count][number // here.count] for number in range(len(group)))


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


def _settled(outcomes: list[_Outcome], own: Exception | None) -> list[Any]:
    failed = next((item for item in outcomes if item.mistake is not None or item.error), None)
    if failed is None:
        return [item.value for item in outcomes]
    if own is not None:
        raise own
    raise failed.mistake if failed.mistake is not None else ElsewhereError(failed.error)


def _watch() -> None:
    """Listen for the failure of another process."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  public in torch's docs

    host = "localhost" if is_first() else os.environ.get("MASTER_ADDR", "localhost")
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False) if is_first() else None
    port = gather(0 if store is None else store.port)[0]
    # A thread of its own must not wait for what this one asks.
    mine, ears = (TCPStore(host, port, is_master=False) for _ in range(2))
    _links.watch = _Watch(mine, ears, store)
    wait_for_all()


def announce(error: BaseException, status: int = 1) -> None:
    """Tell the other processes that this one has failed, if they listen; of several errors, the first one counts."""
    if _links.watch is None or isinstance(error, ElsewhereError):
        return
    text = "" if isinstance(error, KeyboardInterrupt) else _named(error)
    if text:
        error.add_note(f"This was process {place().rank} of {place().count}.")
    if isinstance(error, UserError):
        text, status = str(error) if is_first() else f"in process {place().rank}: {error}", 2
    _links.watch.fail(text, status)


def tells(error: BaseException, status: int = 1) -> bool:
    """Whether this process has to tell the user of the error that ends it: the first one does, or nobody else would."""
    if _links.watch is None:
        return is_first() and not isinstance(error, ElsewhereError)
    announce(error, status)
    return is_first() or not _links.watch.was_said(2 * GRACE)


def told() -> None:
    """Note that the user has been told of the error."""
    if _links.watch is not None:
        _links.watch.said()


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
            time.sleep(_POLL)  # for the others to hear it while this process is there

    def was_said(self, seconds: float) -> bool:
        """Whether another process tells the user within some seconds."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                if self._store.check([_SAID]):
                    # The first process would see this one leave as an error of its own.
                    time.sleep(2 * _POLL)
                    return True
            except RuntimeError:  # the first process has ended
                return True
            time.sleep(_POLL / 5)
        return False

    def _listen(self) -> None:
        while not self._stop.wait(_POLL):
            try:
                if self._ears.check([_FAILED]):
                    _, status, text = self._ears.get(_FAILED).decode().split(" ", 2)
                    break
            except RuntimeError:
                status, text = "1", f"process 0 of {place().count} has ended"
                break
        else:
            return
        if not self._stop.wait(GRACE):
            self._leave(int(status), text)

    def _leave(self, status: int, text: str) -> None:
        with suppress(RuntimeError):
            if is_first() and not self._ears.check([_SAID]):
                if text:
                    print(f"error: {text}", file=sys.stderr)
                self._ears.set(_SAID, "1")
        time.sleep(_POLL)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
