"""The page of a run while the run goes on: written again after each stage and at times in between."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tokenward.display import Display, Moment
from tokenward.report.page import Reports
from tokenward.report.progress import Progress, remove_progress

BETWEEN, AFTER = 5.0, 1.0
"""Least seconds between two pages within a stage, and at the end of a stage."""

SHARE, MOST = 0.005, 0.008
"""Pages are written only while they have taken less than this share of the run's time: within a stage, and at its end."""


class GrowingPage:
    """Writes a run's page again while the run goes on; ``Display.follow`` calls it.

    Args:
        folder: The run's folder.
        stages: The stages that the run goes through.
        say: Shows a line.

    Attributes:
        seconds: Time that the pages have taken.
        pages: How many were written.
    """

    def __init__(self, folder: Path, stages: Sequence[str], say: Callable[[str], None]) -> None:
        self._folder, self._stages, self._say = folder, stages, say
        self._reports, self._moment = Reports(folder, plugins=True), Moment()
        self._begun = self._last = time.monotonic()
        self._failed = False
        self.seconds, self.pages = 0.0, 0

    def __call__(self, moment: Moment) -> None:
        """Note where the run is, and write its page if it is time for it."""
        if moment.ended and moment.stage == self._stages[-1]:
            return  # the final report follows
        self._moment, now = moment, time.monotonic()
        pause, share = (AFTER, MOST) if moment.ended else (BETWEEN, SHARE)
        if now - self._last >= pause and self.seconds <= share * (now - self._begun):
            self.write()

    def write(self, *, stopped: bool = False) -> None:
        """Write the page now. If that fails, a line says so and no further page is written; the run goes on."""
        if self._failed:
            return
        begun = time.monotonic()
        try:
            Progress(stages=self._stages, moment=self._moment, stopped=stopped).write(self._folder)
            self._reports.make().save()
        except Exception as error:  # whatever it is, hours of training must not end for it
            self._failed = True
            self._say(f"  warning: the report cannot be written while the run goes on: {error}")
        self._last = time.monotonic()
        self.seconds, self.pages = self.seconds + self._last - begun, self.pages + 1


@contextmanager
def growing(folder: Path, stages: Sequence[str], display: Display) -> Iterator[GrowingPage]:
    """In the context, the page of a run grows with it. After an error or Ctrl-C it says where the run stopped."""
    page = display.follow = GrowingPage(folder, stages, display.line)
    try:
        yield page
    except BaseException:
        if page.pages:
            page.write(stopped=True)
        raise
    else:
        remove_progress(folder)
    finally:
        display.follow = None
