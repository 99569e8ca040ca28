"""The output of a run: stage headings, progress with the time left, tables. Without a terminal, plain lines."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from tokenward.hidden import without_known

WIDE = 110
"""In a terminal with at least this many columns, progress bars are long."""

PLAIN_STEPS, PLAIN_SECONDS = 10, 10.0
"""Without a terminal, most lines per progress, and the least time from one to the next."""

MOST_DIGITS = 12
"""Most decimals; float32 has no more for a number near 1."""


class Moment(NamedTuple):
    """Where a run is.

    Attributes:
        stage: The stage that runs, or has just ended.
        task: The task in it that is counted; empty before the first.
        done: Steps of the task that are done.
        total: All its steps.
        ended: Whether the stage has ended.
    """

    stage: str = ""
    task: str = ""
    done: int = 0
    total: int = 0
    ended: bool = False


_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)
_DIRECTIONS = (0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A))
_SHOWN = {**_PICTURES, **{code: f"‹U+{code:04X}›" for code in _DIRECTIONS}}


def printable(text: str) -> str:
    """The text with a picture for each control character, and a name for each mark that turns the writing direction.

    A terminal would obey them, and texts of models, data and files of others may hold some. Known secrets are masked.
    """
    return without_known(text).translate(_SHOWN)


class Display:
    """Shows the output of a run.

    Args:
        quiet: Show nothing.
        console: Where to write; None is standard output.

    Attributes:
        follow: Called when a stage begins or ends and with each step of a progress, also if nothing is shown; or None.
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(quiet=quiet, highlight=False)
        self.follow: Callable[[Moment], None] | None = None
        self._stage = ""

    def heading(self, stage: str, note: str = "") -> None:
        """Show the name of a stage that starts."""
        self._stage = stage
        self.console.print(
            Text.assemble((f"\n{printable(stage)}", "bold"), f"  {printable(note)}" if note else "")
        )
        self.tell()

    def tell(self, task: str = "", done: int = 0, total: int = 0, *, ended: bool = False) -> None:
        """Tell a follower where the run is; nothing is shown."""
        if self.follow is not None:
            self.follow(Moment(self._stage, task, done, total, ended))

    def line(self, text: str) -> None:
        """Show one line. It is never read as markup, because it may hold a user's text."""
        # Without a terminal there is no width: log files are searched line by line.
        self.console.print(Text(printable(text)), soft_wrap=not self.console.is_terminal)

    def text(self, text: Text) -> None:
        """Show styled text."""
        text = text.copy()
        text.plain = printable(text.plain)
        self.console.print(text, soft_wrap=not self.console.is_terminal)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Show a table. All columns except the first are aligned to the right."""
        table = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            box=None,
            pad_edge=False,
            padding=(0, 2, 0, 0),
            min_width=len(title),  # otherwise rich wraps the title to the width of the columns
        )
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        self.console.print()
        self.console.print(table)

    def listing(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """Show a table of words, aligned to the left. Only the columns in the middle are wrapped."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for number, column in enumerate(columns):
            table.add_column(column, no_wrap=number in (0, len(columns) - 1), overflow="fold")
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        self.console.print(table)

    @contextmanager
    def progress(self, label: str, total: int, *, brief: bool = False) -> Iterator["Bar"]:
        """A progress bar with the time left, or a few lines without a terminal. A ``total`` of 0 is not known yet.

        One that is ``brief`` leaves nothing on the screen if it was quick, because a line of its own follows it.
        """
        if not self.console.is_terminal:
            yield Bar(self, label, total, brief=brief)
            return
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=30 if self.console.width >= WIDE else 12),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[note]}", style="dim"),
        )
        with Progress(*columns, console=self.console, transient=brief) as shown:
            task = shown.add_task(label, total=total or None, note="")
            yield Bar(self, label, total, shown, task)


class Bar:
    """Progress of one task; made by :meth:`Display.progress`."""

    def __init__(
        self,
        display: Display,
        label: str,
        total: int,
        shown: Progress | None = None,
        task: TaskID | None = None,
        *,
        brief: bool = False,
    ) -> None:
        self._display, self._label, self._total, self._brief = display, label, total, brief
        self._shown, self._task = shown, task
        self._done, self._lines, self._first = 0, 0, 0
        self._start = self._said = time.monotonic()

    def begin(self, done: int) -> None:
        """Start with ``done`` steps that an earlier run has finished."""
        self._first = self._done = done
        self.advance(0)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Add ``count`` finished steps."""
        self._done += count
        self._show(count, note)
        self._display.tell(self._label, self._done, self._total)

    def reach(self, done: int, total: int, note: str = "") -> None:
        """Show that ``done`` of ``total`` steps are finished. A total of 0 is not known, and the note tells how far it is."""
        if total != self._total and self._shown is not None and self._task is not None:
            self._shown.update(self._task, total=total or None)
        self._total = total
        self.advance(done - self._done, note)

    def note(self, note: str) -> None:
        """Show another note, without a step."""
        self.advance(0, note)

    def _show(self, count: int, note: str) -> None:
        if self._shown is not None and self._task is not None:
            self._shown.update(self._task, completed=self._done)
            if note:
                self._shown.update(self._task, note=_fitting(note, self._room()))
            return
        lines = PLAIN_STEPS * self._done // max(self._total, 1)
        if count and lines > self._lines and self._is_due():
            self._lines, self._said = lines, time.monotonic()
            line = f"  {self._label} {self._done}/{self._total}  {self._left()}  {note}".rstrip()
            self._display.line(line)
        elif not self._total and note and time.monotonic() - self._said >= PLAIN_SECONDS:
            self._said = time.monotonic()
            self._display.line(f"  {self._label}: {note}")

    def _is_due(self) -> bool:
        """Whether a line is worth its place: the last one, or one after some time."""
        ends = self._done >= self._total and not self._brief
        return ends or time.monotonic() - self._said >= PLAIN_SECONDS

    def _room(self) -> int:
        """Columns left for a note."""
        width = self._display.console.width
        taken = (30 if width >= WIDE else 12) + len(self._label) + 2 * len(str(self._total)) + 15
        return width - taken

    def _left(self) -> str:
        elapsed = time.monotonic() - self._start
        if self._done >= self._total:
            return f"took {_clock(elapsed)}"
        speed = (self._done - self._first) / max(elapsed, 1e-9)
        return f"{_clock((self._total - self._done) / max(speed, 1e-9))} left"


def _fitting(note: str, room: int) -> str:
    """The first parts of a note, separated by two spaces, that fit; otherwise rich would squeeze the bar."""
    parts = note.split("  ")
    while len(parts) > 1 and len("  ".join(parts)) > room:
        parts.pop()
    return "  ".join(parts)


def digits(scale: float, usual: int) -> int:
    """Decimals for numbers of a scale: the usual number, or enough for two significant digits of the scale.

    Args:
        scale: The largest absolute value among the numbers that are shown together.
        usual: Decimals for numbers of 1 and more.
    """
    size = abs(scale)
    if not 0 < size < math.inf:
        return usual
    return max(usual, min(1 - math.floor(math.log10(size)), MOST_DIGITS))


def rounded(value: float, scale: float, usual: int = 3) -> str:
    """A number with the decimals of its scale, see :func:`digits`; ``none`` for NaN."""
    return f"{value:.{digits(scale, usual)}f}" if value == value else "none"


def signed(value: float, scale: float, usual: int = 2) -> str:
    """Like :func:`rounded`, with a sign."""
    return f"{value:+.{digits(scale, usual)}f}" if value == value else "none"


def interval(low: float, high: float, n: int, scale: float) -> str:
    """The ends of an interval with the decimals of its scale; ``-`` where resamples say nothing, of one example or of equal ones."""
    return f"{rounded(low, scale)} .. {rounded(high, scale)}" if n != 1 and low != high else "-"


def largest(values: Iterable[float]) -> float:
    """The largest absolute value of the finite numbers; 0 if there is none."""
    return max((abs(value) for value in values if math.isfinite(value)), default=0.0)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
