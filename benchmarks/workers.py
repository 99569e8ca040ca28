"""Processes that are measured in turns: each side in its own, one at work at a time.

Two sides in one process would share caches, allocator and peak memory. Two processes at once would
share the cores. So the parent asks one, waits for its answer, then asks the other; who is not asked sleeps
in a read.
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
    """A side in a process of its own.

    Args:
        side: ``"module:function"`` of what runs there; see :func:`serve`.
        settings: What it is given; plain JSON.
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
            raise RuntimeError(
                f"{self.side} ended with status {self._process.wait()}; its messages are above"
            )
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # whoever reads sees the end and stops
        self._process.wait()


def thread_environment(threads: int) -> dict[str, str]:
    """Variables that give a process so many threads, all of which sleep when it waits.

    A waiting side must not spin on a core that the other one needs.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    quiet = {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    return {**dict.fromkeys(names, str(threads)), "TOKENIZERS_PARALLELISM": "false", **quiet}


class Closed(Exception):
    """Nothing will be asked any more."""


class Channel:
    """The worker's end: requests in, answers out, one JSON object a line."""

    def __init__(self) -> None:
        # Libraries print; only answers may reach the parent.
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def receive(self) -> dict[str, Any]:
        """The next request.

        Raises:
            Closed: there is none.
        """
        line = sys.stdin.readline()
        if not line:
            raise Closed
        return json.loads(line)

    def send(self, answer: Mapping[str, Any]) -> None:
        """Answer the request."""
        self._out.write(json.dumps(dict(answer)) + "\n")
        self._out.flush()


Actions = Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]]
"""What a worker does when it is asked, by the request's name."""


def memory_now(_: dict[str, Any]) -> dict[str, Any]:
    """The process's peak and present memory."""
    return dict(status_bytes("VmHWM", "VmRSS", "RssAnon"))


def serve(channel: Channel, actions: Actions, facts: Mapping[str, Any]) -> None:
    """Say that the side is ready, then answer until the parent closes."""
    channel.send(facts)
    known = {"memory": memory_now, **actions}
    while True:
        request = channel.receive()
        channel.send(known[request["do"]](request))


def main() -> None:
    """Run a side: the command of :class:`Worker`."""
    import importlib

    import torch

    channel = Channel()
    module, _, name = sys.argv[1].partition(":")
    settings = json.loads(sys.argv[2])
    torch.set_num_threads(settings["threads"])
    try:
        getattr(importlib.import_module(module), name)(channel, settings)
    except Closed:
        # Nothing is left to say; tearing down threads and file systems would only take time.
        os._exit(0)


if __name__ == "__main__":
    main()
