"""Token-level preference alignment of language models.

Preferences compare whole responses, but a model learns one token at a time. tokenward estimates which tokens
carry a preference, and trains on them.

    import tokenward

    # In a script:
    oracle = tokenward.train_oracle("default", pairs, args=args)
    tokenward.SelectiveTrainer("default", args, pairs, oracle=oracle).train()

    # Or all stages of a recipe; finished stages are skipped:
    run = tokenward.run("recipes/quickstart.yaml")
    figures = tokenward.read_figures(run)

"""

import importlib
from typing import TYPE_CHECKING, Any

from tokenward.errors import UserError
from tokenward.types import Comparison, Message, Span

if TYPE_CHECKING:
    from tokenward import losses
    from tokenward.api.inputs import TokenSettings
    from tokenward.api.reinforce import ReinforceTrainer
    from tokenward.api.scored import evaluate, score, select
    from tokenward.api.trainer import SelectiveTrainer
    from tokenward.api.training import train_oracle, train_reward
    from tokenward.evaluation.statistics import Figure
    from tokenward.models.logprobs import token_logprobs
    from tokenward.models.reward import RewardSettings
    from tokenward.objectives import (
        DPO,
        IPO,
        KTO,
        ORPO,
        SFT,
        TBPO,
        TDPO,
        Losses,
        Needs,
        Objective,
        Pairwise,
        PlackettLuce,
        Reinforce,
        Selected,
        SePO,
        SimPO,
        SparsePO,
        Sum,
        TokenKL,
        TReg,
        WeightedLikelihood,
    )
    from tokenward.report.page import make_report
    from tokenward.sampling import SamplingSettings
    from tokenward.sampling.server import ServerSampler
    from tokenward.sampling.vllm import VllmSampler
    from tokenward.scoring.basic import Record
    from tokenward.scoring.export import TokenRewards
    from tokenward.scoring.scorers import (
        Activation,
        Attention,
        Combine,
        Counterfactual,
        Entropy,
        External,
        LogProbability,
        LogRatio,
        Position,
        Probability,
        Random,
        Rank,
        Reward,
        Scorer,
        Similarity,
        Spans,
        Surprisal,
    )
    from tokenward.scoring.texts import ScoredResponse, ScoredToken, TokenScorer
    from tokenward.selection import (
        KeepAll,
        ScoredTokens,
        Selector,
        SideRule,
        SoftWeights,
        Threshold,
        TopFraction,
        Transform,
    )
    from tokenward.stages.evaluation import read_figures
    from tokenward.stages.run import Run
    from tokenward.tokens.batches import TokenBatch
    from tokenward.tokens.table import TokenTable
    from tokenward.tools.run import open_run
    from tokenward.tools.run import run_recipe as run
    from tokenward.training.arguments import TokenTrainingArguments

__version__ = "0.1.0"

_NAMES = {
    "api.inputs": "TokenSettings",
    "api.scored": "evaluate score select",
    "api.reinforce": "ReinforceTrainer",
    "api.trainer": "SelectiveTrainer",
    "api.training": "train_oracle train_reward",
    "evaluation.statistics": "Figure",
    "models.logprobs": "token_logprobs",
    "models.reward": "RewardSettings",
    "objectives": (
        "DPO IPO KTO Losses Needs ORPO Objective Pairwise PlackettLuce Reinforce SFT SePO Selected SimPO SparsePO Sum TBPO "
        "TDPO TReg TokenKL WeightedLikelihood"
    ),
    "report.page": "make_report",
    "sampling": "SamplingSettings",
    "sampling.server": "ServerSampler",
    "sampling.vllm": "VllmSampler",
    "scoring.export": "TokenRewards",
    "scoring.basic": "Record",
    "scoring.scorers": (
        "Activation Attention Combine Counterfactual Entropy External LogProbability LogRatio Position Probability "
        "Random Rank Reward Scorer Similarity Spans Surprisal"
    ),
    "scoring.texts": "ScoredResponse ScoredToken TokenScorer",
    "selection": "KeepAll ScoredTokens Selector SideRule SoftWeights Threshold TopFraction Transform",
    "stages.evaluation": "read_figures",
    "stages.run": "Run",
    "tokens.batches": "TokenBatch",
    "tokens.table": "TokenTable",
    "tools.run": "open_run",
    "training.arguments": "TokenTrainingArguments",
}
"""The public names of each module."""

_LAZY = {name: (module, name) for module, names in _NAMES.items() for name in names.split()}
_LAZY |= {"run": ("tools.run", "run_recipe"), "losses": ("losses", "")}

__all__ = [
    "DPO", "IPO", "KTO", "ORPO", "SFT", "TBPO", "TDPO", "Activation", "Attention", "Combine", "Comparison",
    "Counterfactual", "Entropy", "External", "Figure", "KeepAll", "LogProbability", "LogRatio", "Losses", "Message",
    "Needs", "Objective", "Pairwise", "PlackettLuce", "Position", "Probability", "Random", "Rank", "Record",
    "Reinforce", "ReinforceTrainer", "Reward", "RewardSettings", "Run", "SamplingSettings", "ScoredResponse", "ScoredToken", "ScoredTokens",
    "Scorer", "SePO", "Selected", "SelectiveTrainer", "Selector", "ServerSampler", "SideRule", "SimPO", "Similarity", "SoftWeights",
    "Span", "Spans", "SparsePO", "Sum", "Surprisal", "TReg", "Threshold", "TokenBatch", "TokenKL", "TokenRewards",
    "TokenScorer", "TokenSettings", "TokenTable", "TokenTrainingArguments", "TopFraction", "Transform", "UserError",
    "VllmSampler", "WeightedLikelihood", "evaluate", "losses", "make_report", "open_run", "read_figures", "run", "score", "select",
    "token_logprobs", "train_oracle", "train_reward",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds, which the help of the command line must not wait for.
    if name not in _LAZY:
        raise AttributeError(f"module 'tokenward' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    found = importlib.import_module(f"tokenward.{module}")
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return __all__
