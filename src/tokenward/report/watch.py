"""Serves the report of a run on this computer; the page loads itself again while the run goes on."""

import errno
import json
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any

from tokenward.artifacts import MANIFEST, fingerprint
from tokenward.errors import UserError
from tokenward.report.page import Reports, waiting_page
from tokenward.report.progress import read_progress
from tokenward.stages.preview import FILE

HOST = "127.0.0.1"
PORT = 8000

SHOWN = (MANIFEST, FILE, "history.jsonl", "samples.jsonl", "metrics.json")
"""The files of a stage whose change is news."""

_NOT_YET = ("not-a-run", "no-pairs")


class WatchedReport:
    """The page of a run, made again when it is asked for and the run's files have changed.

    Attributes:
        waits: Whether the folder held nothing to show at the last look; the page then says so.
    """

    def __init__(self, reports: Reports) -> None:
        self._reports, self._lock = reports, Lock()
        self._made: tuple[str, str] | None = None
        self.waits = False

    @property
    def version(self) -> str:
        """Identifies what the page shows, except how far the current stage is."""
        folder, found = self._reports.folder, []
        for path in sorted(path for name in SHOWN for path in folder.glob(f"*/{name}")):
            status = path.stat()
            found.append([str(path), status.st_size, status.st_mtime_ns])
        progress = read_progress(folder)
        return fingerprint([found, progress and [progress.moment.stage, progress.stopped]])

    def news(self) -> dict[str, str]:
        """The version of the page, and where the run is."""
        progress = read_progress(self._reports.folder)
        return {"version": self.version, "now": "" if progress is None else progress.words}

    def html(self) -> str:
        """The page now.

        Raises:
            UserError: the report cannot be made, for another reason than that there is nothing yet.
        """
        with self._lock:
            version = self.version
            if self._made is None or self._made[0] != version:
                self._made = version, self._make(version)
            return self._made[1]

    def _make(self, version: str) -> str:
        try:
            self.waits = False
            return self._reports.make(version).html
        except UserError as error:
            if error.code not in _NOT_YET:
                raise
            self.waits = True
            return waiting_page(self._reports.folder, f"Nothing to show yet: {error}", version)


def report_server(watched: WatchedReport, port: int) -> ThreadingHTTPServer:
    """A server of a run's page for this computer, and of nothing else.

    Raises:
        UserError: the port cannot be used.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answers: dict[str, tuple[str, Callable[[], str]]] = {
                "/": ("text/html", watched.html),
                "/news": ("application/json", lambda: json.dumps(watched.news())),
            }
            # A page of another site that has this address would have its own name here.
            name, _, _ = self.headers.get("Host", "").partition(":")
            if self.path not in answers or name not in (HOST, "localhost"):
                self.send_error(404)
                return
            kind, make = answers[self.path]
            try:
                content = make().encode()
            except (OSError, ValueError, UserError) as error:  # a stage is being replaced: asked again soon
                self.send_error(503, explain=str(error))
                return
            with suppress(ConnectionError):  # the reader has closed the page
                self.send_response(200)
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Requests are not shown."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        problem = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
        raise UserError(
            f"port {port} {problem}. Choose another one, such as --port {PORT + (port == PORT)}.",
            code="port-in-use",
        ) from error


def watch(reports: Reports, port: int, say: Callable[[str], None]) -> None:
    """Serve a run's page until Ctrl-C.

    Raises:
        UserError: the port cannot be used, or the report cannot be made.
    """
    watched = WatchedReport(reports)
    watched.html()  # a mistake in an option is an error now, not later in the browser
    with report_server(watched, port) as server:
        say(f"http://{HOST}:{server.server_address[1]} shows {reports.folder}; Ctrl-C ends it")
        if watched.waits:
            say("There is nothing to show yet; the page appears when the run has begun.")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say(f"\n{reports.folder} is no longer shown")
