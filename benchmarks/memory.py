"""Memory of this process, from Linux's ``/proc``."""

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

MEGABYTE = 2**20


def status_bytes(*names: str) -> dict[str, int]:
    """Fields of ``/proc/self/status`` in bytes, such as ``VmHWM``, ``VmRSS`` and ``RssAnon``."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in names:
            found[name] = int(value.split()[0]) * 1024
    return found


def reset_peak() -> None:
    """Reset ``VmHWM`` to the current memory."""
    Path("/proc/self/clear_refs").write_text("5")


class AnonymousPeak:
    """Peak of ``RssAnon`` while the block runs, by sampling.

    The kernel only records a peak of all resident memory. It includes mapped files, which the kernel may drop at any
    time.
    """

    def __init__(self, every_s: float = 0.02) -> None:
        self.peak = 0
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._stop.wait(self._every_s):
            self._look()

    def _look(self) -> None:
        self.peak = max(self.peak, status_bytes("RssAnon")["RssAnon"])

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._look()
        self._stop.set()
        self._thread.join()
