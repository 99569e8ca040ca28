"""The Python API: one function a stage, and ``run`` for all of them."""

from tokenward.pipeline.command import open_run, run_recipe
from tokenward.pipeline.context import GUIDED_STAGES, STAGES, Run
from tokenward.pipeline.data import prepare_data
from tokenward.pipeline.evaluate_stage import evaluate
from tokenward.pipeline.examples import prepare_examples
from tokenward.pipeline.expert_stage import train_expert, train_oracle
from tokenward.pipeline.figures import read_figures, show_figures
from tokenward.pipeline.guidance_stage import train_guided
from tokenward.pipeline.guided_evaluation import evaluate_guided
from tokenward.pipeline.policy_stage import train_policy
from tokenward.pipeline.reward_stage import train_reward
from tokenward.pipeline.score_stages import compute_reference, compute_scores
from tokenward.pipeline.stages import run_through
from tokenward.pipeline.train_stages import train_referee, train_sft

__all__ = [
    "GUIDED_STAGES",
    "STAGES",
    "Run",
    "compute_reference",
    "compute_scores",
    "evaluate",
    "evaluate_guided",
    "open_run",
    "prepare_data",
    "prepare_examples",
    "read_figures",
    "run_recipe",
    "run_through",
    "show_figures",
    "train_expert",
    "train_guided",
    "train_oracle",
    "train_policy",
    "train_referee",
    "train_reward",
    "train_sft",
]
