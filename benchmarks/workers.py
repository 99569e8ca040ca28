"""Processes that are measured in turns: one per side, of which only one works at a time.

Two sides in one process would share caches, allocator and peak memory, and two processes at the same time would share the
cores. So the parent sends a request to one process and waits for its answer, then to the other. A process without a
request blocks in a read.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.memory import status_bytes

ROOT = Path(__file__).parent.parent


class Worker:
    """A side in a separate process.

    Args:
        side: ``"module:function"`` to run there; see :func:`serve`.
        settings: Its settings, as plain JSON.
    """

    def __init__(self, side: str, settings: Mapping[str, Any]) -> None:
        self.side = side
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.workers", side, json.dumps(dict(settings))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | thread_environment(int(settings["threads"])),
        )
        self.facts = self._answer()

    def ask(self, request: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": request, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.side} ended with status {self._process.wait()}. See its output above")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # the worker sees the end of its input and stops
        self._process.wait()


def thread_environment(threads: int) -> dict[str, str]:
    """Environment for a process with this many threads, which sleep while it waits.

    A waiting process must not spin on a core that the other one needs.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    quiet = {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    return {**dict.fromkeys(names, str(threads)), "TOKENIZERS_PARALLELISM": "false", **quiet}


class Closed(Exception):
    """There will be no more requests."""


class Channel:
    """The worker's side of the connection: requests and answers, one JSON object per line."""

    def __init__(self) -> None:
        # Libraries print to stdout, but only answers may reach the parent.
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def receive(self) -> dict[str, Any]:
        """Return the next request.

        Raises:
            Closed: There are no more requests.
        """
        line = sys.stdin.readline()
        if not line:
            raise Closed
        return json.loads(line)

    def send(self, answer: Mapping[str, Any]) -> None:
        """Send the answer to a request."""
        self._out.write(json.dumps(dict(answer)) + "\n")
        self._out.flush()


Actions = Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]
"""The actions of a worker, by the name of the request."""


def memory_now(_: dict[str, Any]) -> dict[str, Any]:
    """Peak and current memory of the process."""
    return dict(status_bytes("VmHWM", "VmRSS", "RssAnon"))


def serve(channel: Channel, actions: Actions, facts: Mapping[str, Any]) -> None:
    """Report that the side is ready, then answer requests until the parent closes."""
    channel.send(facts)
    known = {"memory": memory_now, **actions}
    while True:
        request = channel.receive()
        channel.send(known[request["do"]](request))


def main() -> None:
    """Run a side; :class:`Worker` starts this command."""
    import importlib

    import torch

    channel = Channel()
    module, _, name = sys.argv[1].partition(":")
    settings = json.loads(sys.argv[2])
    torch.set_num_threads(settings["threads"])
    try:
        getattr(importlib.import_module(module), name)(channel, settings)
    except Closed:
        # Exit without teardown, which would only take time.
        os._exit(0)


if __name__ == "__main__":
    main()
