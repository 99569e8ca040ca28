"""Preference sources: they score the replies that were sampled for one prompt."""

from tokenward.sampling.sources.base import Length, PreferenceSource, RowError, call_source
from tokenward.sampling.sources.models import SequenceClassifier
from tokenward.sampling.sources.text import ChrF, Meteor, Rouge

SOURCES: dict[str, type[PreferenceSource]] = {
    "rouge": Rouge,
    "meteor": Meteor,
    "chrf": ChrF,
    "classifier": SequenceClassifier,
    "length": Length,
}

__all__ = [
    "SOURCES", "ChrF", "Length", "Meteor", "PreferenceSource", "Rouge", "RowError", "SequenceClassifier", "call_source",
]  # fmt: skip
