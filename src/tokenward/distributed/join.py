"""The processes of a launch join, and what every call between them rests on."""

import atexit
import math
import os
import sys
import threading
import time
from datetime import timedelta
from typing import Any, TypeVar

from tokenward.distributed.launch import alone, is_first, links, place, slurm_address
from tokenward.distributed.watch import listen
from tokenward.errors import UserError

T = TypeVar("T")

LIMIT = timedelta(days=30)
"""How long a process waits for the others. What ends a wait is an error, or the launcher."""

LIMIT_ON_GPUS = timedelta(hours=1)
"""How long a process waits for the others in a collective of a training on GPUs."""

PATIENCE = 60.0
"""Seconds after which the first process says that it waits for the others."""


def end_with_others() -> None:
    """End this process when another one has failed, once they have joined. For commands: a script of the user's is not ended."""
    links.ends_with_others = True


def start() -> None:
    """Join the other processes, if there are some; a second call does nothing.

    Raises:
        UserError: the launcher and torch count them differently.
    """
    if place().count == 1 or links.group is not None:
        return
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    if not dist.is_initialized():
        _tell_torch()
        said = threading.Timer(PATIENCE, _say_waiting)
        said.daemon = True
        said.start()
        if not torch.accelerator.is_available():
            PartialState(cpu=True, timeout=LIMIT)
        elif torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") != "true":
            # With gloo beside NCCL, because a recipe may set its device to cpu.
            PartialState(backend="cpu:gloo,cuda:nccl", timeout=LIMIT_ON_GPUS)
        else:
            PartialState(timeout=LIMIT_ON_GPUS)
        said.cancel()
    if not dist.is_initialized() or dist.get_world_size() != place().count:
        joined = dist.get_world_size() if dist.is_initialized() else 1
        raise UserError(
            f"the launcher started {place().count} processes, but torch.distributed has joined {joined}. Start all of them with one "
            "command.",
            code="processes-differ",
        )
    links.group = dist.new_group(backend="gloo", timeout=LIMIT)
    atexit.register(_part)
    if links.ends_with_others:
        listen(gather)


def _say_waiting() -> None:
    if is_first():
        print(
            f"note: process 0 has waited {PATIENCE:.0f} s for the other {place().count - 1}. It goes on when each of them has made the same "
            "call",
            file=sys.stderr,
        )


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
    dist.all_gather_object(found, value, group=links.group)
    return found


def wait_for_all() -> None:
    """Wait until every process is here."""
    if not alone():
        _meet()


def _meet() -> None:
    """Wait for the others."""
    import torch.distributed as dist

    start()
    _wait_for(dist.barrier(group=links.group, async_op=True))


def _wait_for(work: Any) -> None:
    """Wait for a collective in a way that a signal can end."""
    pause, due = 0.0001, time.monotonic() + PATIENCE
    while not work.is_completed():
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
        if time.monotonic() > due:
            _say_waiting()
            due = math.inf
    work.wait()


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process. Cheap enough for every training step."""
    if alone():
        return flag
    import torch
    import torch.distributed as dist

    start()
    found = torch.tensor([int(flag)])
    _wait_for(dist.all_reduce(found, dist.ReduceOp.MAX, group=links.group, async_op=True))
    return bool(found.item())


def end() -> None:
    """End well: nobody listens to the first process any more when it ends."""
    if links.watch is not None:
        wait_for_all()
        links.watch.stop()
        wait_for_all()


def group() -> Any:
    """The group of the shell's messages, on gloo."""
    return links.group
