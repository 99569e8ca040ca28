"""The Python API: one function a stage, and ``run`` for all of them."""

from tokenward.pipeline.auxiliary_stage import train_auxiliary, train_oracle
from tokenward.pipeline.command import open_run, run_recipe
from tokenward.pipeline.context import ONLINE_STAGES, STAGES, Run
from tokenward.pipeline.data import prepare_data
from tokenward.pipeline.evaluate_stage import evaluate
from tokenward.pipeline.examples import prepare_examples
from tokenward.pipeline.figures import read_figures, show_figures
from tokenward.pipeline.online_evaluation import evaluate_online
from tokenward.pipeline.online_stage import train_online
from tokenward.pipeline.policy_stage import train_policy
from tokenward.pipeline.reward_stage import train_reward
from tokenward.pipeline.score_stages import compute_reference, compute_scores
from tokenward.pipeline.stages import run_through
from tokenward.pipeline.train_stages import train_eval_reward, train_sft

__all__ = [
    "ONLINE_STAGES",
    "STAGES",
    "Run",
    "compute_reference",
    "compute_scores",
    "evaluate",
    "evaluate_online",
    "open_run",
    "prepare_data",
    "prepare_examples",
    "read_figures",
    "run_recipe",
    "run_through",
    "show_figures",
    "train_auxiliary",
    "train_eval_reward",
    "train_online",
    "train_oracle",
    "train_policy",
    "train_reward",
    "train_sft",
]
