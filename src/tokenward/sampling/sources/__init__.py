"""Preference sources: what ranks the K replies that were sampled for one prompt."""

from tokenward.sampling.sources.base import (
    Group,
    Length,
    PreferenceSource,
    RankedGroup,
    RankedGroups,
    RowError,
    call_source,
    rank_groups,
    ranked,
)
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
    "SOURCES",
    "ChrF",
    "Group",
    "Length",
    "Meteor",
    "PreferenceSource",
    "RankedGroup",
    "RankedGroups",
    "Rouge",
    "RowError",
    "SequenceClassifier",
    "call_source",
    "rank_groups",
    "ranked",
]
