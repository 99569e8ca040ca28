"""Numbers have significant digits at any scale; a log has a line for each thing that is worth one."""

import io
import math

import pytest
from rich.console import Console

from tokenward.display import PLAIN_SECONDS, Display, digits, interval, largest, rounded, signed


@pytest.mark.parametrize(
    ("scale", "shown"),
    [
        (3.0, "+0.00"),
        (0.1, "+0.00"),
        (0.05, "+0.003"),
        (0.003, "+0.0031"),
        (-2e-5, "+0.003142"),
        (0.0, "+0.00"),
    ],
)
def test_the_scale_sets_the_number_of_digits(scale, shown):
    assert signed(0.003142, scale) == shown


def test_the_largest_number_has_two_significant_digits():
    for power in range(9):
        scale = 4.2 * 10.0**-power
        assert float(signed(scale, scale)) == pytest.approx(scale, rel=0.05)
        assert float(rounded(scale, scale)) == pytest.approx(scale, rel=0.05)
    assert digits(1e-300, 2) == 12


def test_nan_has_no_digits():
    assert signed(math.nan, 1.0) == rounded(math.nan, 1.0) == "none"
    assert digits(math.nan, 2) == digits(math.inf, 2) == 2
    assert largest([0.1, -0.3, math.nan, math.inf]) == 0.3
    assert largest([]) == 0.0


def test_one_example_and_equal_ones_have_no_interval():
    assert interval(0.25, 0.75, 2, 1.0) == "0.250 .. 0.750"
    assert interval(0.5, 0.5, 1, 1.0) == interval(0.5, 0.5, 9, 1.0) == "-"
    assert interval(math.nan, math.nan, 0, 1.0) == "none .. none"


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


def lines_of(
    log: io.StringIO, seconds: float, monkeypatch, *, brief: bool = False, steps: int = 100
) -> list[str]:
    """What a progress leaves in a file if each step takes so many seconds."""
    now = [0.0]
    monkeypatch.setattr("tokenward.display.time.monotonic", lambda: now[0])
    with Display(console=Console(file=log)).progress("policy", steps, brief=brief) as bar:
        for step in range(steps):
            now[0] = seconds * (step + 1)
            bar.advance()
    return log.getvalue().splitlines()


def test_progress_in_a_file_is_at_most_a_line_for_each_tenth(log, monkeypatch):
    assert len(lines_of(log, 1.0, monkeypatch)) == 10


@pytest.mark.parametrize(("brief", "count"), [(False, 1), (True, 0)])
def test_quick_progress_in_a_file_is_one_line_or_none(log, monkeypatch, brief, count):
    assert len(lines_of(log, PLAIN_SECONDS / 101, monkeypatch, brief=brief)) == count


def test_a_line_in_a_file_is_not_wrapped_and_has_no_control_characters(log):
    Display(console=Console(file=log, width=20)).line("a reply \x1b[2J\x00 " + "word " * 20)
    assert log.getvalue().rstrip() == "a reply ␛[2J␀ " + ("word " * 20).rstrip()


def test_a_terminal_is_sent_no_codes(log: io.StringIO) -> None:
    hostile = "\x1b[2Jred\x9b1m \u202eabc\u2066 \ud800 \u200dx"
    display = Display(console=Console(file=log, width=200))
    display.heading(hostile, hostile)
    display.line(hostile)
    display.table("t", ("a",), [(hostile,)])
    display.listing(("a",), [(hostile,)])
    shown = log.getvalue()
    assert not {"\x1b", "\x9b", "\u202e", "\u2066", "\ud800"} & set(shown)
    assert shown.count("\u2039U+202E\u203a") == 5
