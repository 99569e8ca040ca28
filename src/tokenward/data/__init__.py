"""Preference data of every common format, read into comparisons."""

from tokenward.data.formats import FORMATS
from tokenward.data.pairs import RULES
from tokenward.data.prepare import Dropped, Loaded, comparison_key, load
from tokenward.data.sources import rows
from tokenward.data.split import uniform

__all__ = ["FORMATS", "RULES", "Dropped", "Loaded", "comparison_key", "load", "rows", "uniform"]
