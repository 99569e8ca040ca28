"""The Python API: one function a stage, and ``run`` for all of them."""

from tokenward.pipeline.command import open_run, run_recipe
from tokenward.pipeline.context import STAGES, Run
from tokenward.pipeline.data import prepare_data
from tokenward.pipeline.evaluate_stage import evaluate, read_figures, show_figures
from tokenward.pipeline.score_stages import compute_reference, compute_scores
from tokenward.pipeline.stages import run_through
from tokenward.pipeline.train_stages import train_oracle, train_policy, train_referee, train_sft

__all__ = [
    "STAGES",
    "Run",
    "compute_reference",
    "compute_scores",
    "evaluate",
    "open_run",
    "prepare_data",
    "read_figures",
    "run_recipe",
    "run_through",
    "show_figures",
    "train_oracle",
    "train_policy",
    "train_referee",
    "train_sft",
]
