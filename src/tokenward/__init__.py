"""Token-level preference alignment of language models.

People compare whole answers; a model learns one token at a time. tokenward finds which tokens carry
a preference and trains with them.

    import tokenward

    run = tokenward.run("recipes/quickstart.yaml")      # every stage; finished ones are skipped
    figures = tokenward.read_figures(run)

Each stage is a function of its own over an opened recipe: ``prepare_data``, ``train_sft``,
``compute_reference``, ``train_oracle``, ``train_reward``, ``compute_scores``, ``train_policy``,
``train_eval_reward``, ``evaluate``; ``train_auxiliary`` for each of the recipe's auxiliary models; in an online run ``prepare_examples``, ``train_online``, ``evaluate_online``.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tokenward.errors import UserError
from tokenward.types import Comparison, Message, Span

if TYPE_CHECKING:
    from tokenward import losses
    from tokenward.models.logprobs import token_logprobs
    from tokenward.report.page import make_report
    from tokenward.scoring.export import TokenRewards
    from tokenward.scoring.texts import TokenScorer
    from tokenward.stages.data import prepare_data
    from tokenward.stages.evaluation import evaluate
    from tokenward.stages.examples import prepare_examples
    from tokenward.stages.figures import read_figures
    from tokenward.stages.online import train_online
    from tokenward.stages.online_evaluation import evaluate_online
    from tokenward.stages.oracle import train_auxiliary, train_oracle
    from tokenward.stages.policy import train_policy
    from tokenward.stages.reward import train_reward
    from tokenward.stages.run import Run
    from tokenward.stages.scores import compute_reference, compute_scores
    from tokenward.stages.training import train_eval_reward, train_sft
    from tokenward.tools.run import open_run
    from tokenward.tools.run import run_recipe as run

__version__ = "0.1.0"

_LAZY = {
    "Run": "stages.run:Run",
    "TokenRewards": "scoring.export:TokenRewards",
    "TokenScorer": "scoring.texts:TokenScorer",
    "compute_reference": "stages.scores:compute_reference",
    "compute_scores": "stages.scores:compute_scores",
    "evaluate": "stages.evaluation:evaluate",
    "evaluate_online": "stages.online_evaluation:evaluate_online",
    "losses": "losses:",
    "make_report": "report.page:make_report",
    "open_run": "tools.run:open_run",
    "prepare_data": "stages.data:prepare_data",
    "prepare_examples": "stages.examples:prepare_examples",
    "read_figures": "stages.figures:read_figures",
    "run": "tools.run:run_recipe",
    "token_logprobs": "models.logprobs:token_logprobs",
    "train_auxiliary": "stages.oracle:train_auxiliary",
    "train_online": "stages.online:train_online",
    "train_oracle": "stages.oracle:train_oracle",
    "train_policy": "stages.policy:train_policy",
    "train_eval_reward": "stages.training:train_eval_reward",
    "train_reward": "stages.reward:train_reward",
    "train_sft": "stages.training:train_sft",
}

__all__ = [
    "Comparison",
    "Message",
    "Run",
    "Span",
    "TokenRewards",
    "TokenScorer",
    "UserError",
    "compute_reference",
    "compute_scores",
    "evaluate",
    "evaluate_online",
    "losses",
    "make_report",
    "open_run",
    "prepare_data",
    "prepare_examples",
    "read_figures",
    "run",
    "token_logprobs",
    "train_auxiliary",
    "train_eval_reward",
    "train_online",
    "train_oracle",
    "train_policy",
    "train_reward",
    "train_sft",
]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; the command line's help must not wait for it.
    if name not in _LAZY:
        raise AttributeError(f"module 'tokenward' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    found = importlib.import_module(f"tokenward.{module}")
    return getattr(found, attribute) if attribute else found
