"""A frozen model that classifies by a discrete prompt, and what ranks prompts by it (TLM's first task)."""

from tokenward.sampling.classification.prompts import (
    Candidate,
    Chosen,
    ClassificationGap,
    LabelledText,
    calibration_offsets,
    choose,
    gap_scores,
    random_prompts,
    read_labelled,
)
from tokenward.sampling.classification.task_model import MaskedModel, TaskModel, load_masked
from tokenward.sampling.classification.template import PromptTemplate, verbalizer_ids

__all__ = [
    "Candidate",
    "Chosen",
    "ClassificationGap",
    "LabelledText",
    "MaskedModel",
    "PromptTemplate",
    "TaskModel",
    "calibration_offsets",
    "choose",
    "gap_scores",
    "load_masked",
    "random_prompts",
    "read_labelled",
    "verbalizer_ids",
]
