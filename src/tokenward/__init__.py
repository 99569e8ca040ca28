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
    from tokenward.pipeline import (
        Run,
        compute_reference,
        compute_scores,
        evaluate,
        evaluate_online,
        open_run,
        prepare_data,
        prepare_examples,
        read_figures,
        train_auxiliary,
        train_eval_reward,
        train_online,
        train_oracle,
        train_policy,
        train_reward,
        train_sft,
    )
    from tokenward.pipeline import run_recipe as run
    from tokenward.report.page import make_report
    from tokenward.scoring.export import TokenRewards
    from tokenward.scoring.texts import TokenScorer

__version__ = "0.1.0"

_LAZY = {
    "Run": "pipeline:Run",
    "TokenRewards": "scoring.export:TokenRewards",
    "TokenScorer": "scoring.texts:TokenScorer",
    "compute_reference": "pipeline:compute_reference",
    "compute_scores": "pipeline:compute_scores",
    "evaluate": "pipeline:evaluate",
    "evaluate_online": "pipeline:evaluate_online",
    "losses": "losses:",
    "make_report": "report.page:make_report",
    "open_run": "pipeline:open_run",
    "prepare_data": "pipeline:prepare_data",
    "prepare_examples": "pipeline:prepare_examples",
    "read_figures": "pipeline:read_figures",
    "run": "pipeline:run_recipe",
    "token_logprobs": "models.logprobs:token_logprobs",
    "train_auxiliary": "pipeline:train_auxiliary",
    "train_online": "pipeline:train_online",
    "train_oracle": "pipeline:train_oracle",
    "train_policy": "pipeline:train_policy",
    "train_eval_reward": "pipeline:train_eval_reward",
    "train_reward": "pipeline:train_reward",
    "train_sft": "pipeline:train_sft",
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
