"""A frozen model that classifies by a discrete prompt, and what ranks prompts by it (TLM's first task)."""

from tokenward.sampling.classification.baselines import random_prompts
from tokenward.sampling.classification.calibration import calibration_offsets
from tokenward.sampling.classification.candidates import Candidate, Chosen, choose
from tokenward.sampling.classification.examples import LabelledText, read_labelled
from tokenward.sampling.classification.gap import ClassificationGap, gap_scores
from tokenward.sampling.classification.masked import MaskedModel, load_masked
from tokenward.sampling.classification.task_model import TaskModel
from tokenward.sampling.classification.template import PromptTemplate
from tokenward.sampling.classification.verbalizers import verbalizer_ids

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
