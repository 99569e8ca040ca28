"""A frozen model that classifies texts with a discrete prompt, and ranks prompts by it (TLM's first task)."""

from tokenward.sampling.classification.prompts import (
    Chosen,
    ClassificationGap,
    LabelledText,
    choose,
    random_prompts,
    read_labelled,
)
from tokenward.sampling.classification.task_model import MaskedModel, TaskModel, load_masked
from tokenward.sampling.classification.template import PromptTemplate

__all__ = [
    "Chosen", "ClassificationGap", "LabelledText", "MaskedModel", "PromptTemplate", "TaskModel", "choose", "load_masked",
    "random_prompts", "read_labelled",
]  # fmt: skip
