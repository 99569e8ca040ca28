"""Numbers are shown with significant digits at any scale."""

import math

import pytest

from tokenward.display import digits, interval, largest, rounded, signed


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


def test_one_example_has_no_interval():
    assert interval(0.25, 0.75, 2, 1.0) == "0.250 .. 0.750"
    assert interval(0.5, 0.5, 1, 1.0) == "-"
    assert interval(math.nan, math.nan, 0, 1.0) == "none .. none"
