"""Preference data of every common shape, read into comparisons."""

from tokenward.data.formats import FORMATS, detect
from tokenward.data.pairs import RULES, pairs
from tokenward.data.prepare import Dropped, Loaded, comparison_key, load
from tokenward.data.sources import rows
from tokenward.data.split import Split, fraction, split, uniform

__all__ = [
    "FORMATS",
    "RULES",
    "Dropped",
    "Loaded",
    "Split",
    "comparison_key",
    "detect",
    "fraction",
    "load",
    "pairs",
    "rows",
    "split",
    "uniform",
]
