"""Ends a process when another one has failed, and settles which of them tells the user."""

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tokenward.distributed.launch import is_first, links, place
from tokenward.errors import UserError

GRACE = 5.0
"""Seconds that a process has to end by itself when another one has failed."""

_POLL = 0.5
_FAILED, _SAID = "failed", "said"


class ElsewhereError(Exception):
    """Another process has failed, with an error that is not the user's; that process shows it."""


def named(error: BaseException) -> str:
    """An error in words, with the process that it comes from."""
    here = place()
    return f"process {here.rank} of {here.count}: {type(error).__name__}: {error}"


def listen(exchange: Callable[[int], list[int]]) -> None:
    """Listen for the failure of another process. ``exchange`` gives the numbers of all processes."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  public in torch's docs

    host = "localhost" if is_first() else os.environ.get("MASTER_ADDR", "localhost")
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False) if is_first() else None
    port = exchange(0 if store is None else store.port)[0]
    # A thread of its own must not wait for what this one asks.
    mine, ears = (TCPStore(host, port, is_master=False) for _ in range(2))
    links.watch = _Watch(mine, ears, store)
    exchange(0)


def announce(error: BaseException, status: int = 1) -> bool:
    """Tell the other processes that this one has failed, if they listen.

    Returns:
        Whether no other process has failed before; its failure may be the reason of this one.
    """
    if links.watch is None or isinstance(error, ElsewhereError):
        return True
    text = "" if isinstance(error, KeyboardInterrupt) else named(error)
    if isinstance(error, UserError):
        text, status = str(error) if is_first() else f"in process {place().rank}: {error}", 2
    return links.watch.fail(text, status)


def leave_for(error: BaseException) -> None:
    """Before a process ends with an error that is not the user's: let the first one tell of it.

    If another process has failed before, this one ends here, without a word.
    """
    if links.watch is None:
        return
    error.add_note(f"This was process {place().rank} of {place().count}.")
    if not announce(error):
        time.sleep(4 * GRACE)  # the listening thread ends the process
    elif not is_first():
        links.watch.was_said(2 * GRACE)


def tells(error: BaseException, status: int = 1) -> bool:
    """Whether this process has to tell the user of the error that ends it: the first one does, or nobody else would."""
    if links.watch is None:
        return is_first() and not isinstance(error, ElsewhereError)
    announce(error, status)
    return is_first() or not links.watch.was_said(2 * GRACE)


def told() -> None:
    """Note that the user has been told of the error."""
    if links.watch is not None:
        links.watch.said()


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

    def fail(self, text: str, status: int) -> bool:
        """Leave a message for the others. The first one stays; returns whether it is this one."""
        mine = f"{place().rank} {status} {text}".encode()
        try:
            return self._store.compare_set(_FAILED, "", mine.decode()) == mine
        except RuntimeError:  # the process that keeps the store has ended
            return False

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
                    rank, status, text = self._ears.get(_FAILED).decode().split(" ", 2)
                    if int(rank) == place().rank:
                        return  # it ends by itself
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
