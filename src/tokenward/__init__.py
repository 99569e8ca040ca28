"""Token-level preference alignment of language models.

People compare whole answers; a model learns one token at a time. tokenward finds which tokens carry
a preference and trains with them.

    import tokenward

    oracle = tokenward.train_oracle("default", pairs, args=args)                # in a script of your own
    tokenward.SelectiveTrainer("default", args, pairs, oracle=oracle).train()

    run = tokenward.run("recipes/quickstart.yaml")      # or a recipe: every stage; finished ones are skipped
    figures = tokenward.read_figures(run)

"""

import importlib
from typing import TYPE_CHECKING, Any

from tokenward.errors import UserError
from tokenward.types import Comparison, Message, Span

if TYPE_CHECKING:
    from tokenward import losses
    from tokenward.api.inputs import TokenSettings
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
        Pairwise,
        PlackettLuce,
        SePO,
        SimPO,
        SparsePO,
        Sum,
        TokenKL,
        TReg,
        WeightedLikelihood,
    )
    from tokenward.report.page import make_report
    from tokenward.sampling.sampler import SamplingSettings
    from tokenward.scoring.export import TokenRewards
    from tokenward.scoring.scorers import (
        Combine,
        Entropy,
        External,
        LogProbability,
        LogRatio,
        Position,
        Probability,
        Random,
        Reward,
        Spans,
        Surprisal,
    )
    from tokenward.scoring.texts import TokenScorer
    from tokenward.selection import KeepAll, SideRule, SoftWeights, Threshold, TopFraction, Transform
    from tokenward.stages.evaluation import read_figures
    from tokenward.stages.run import Run
    from tokenward.tokens.table import TokenTable
    from tokenward.tools.run import open_run
    from tokenward.tools.run import run_recipe as run
    from tokenward.training.arguments import TokenTrainingArguments

__version__ = "0.1.0"

_LAZY = {
    "Combine": "scoring.scorers:Combine",
    "DPO": "objectives:DPO",
    "Entropy": "scoring.scorers:Entropy",
    "External": "scoring.scorers:External",
    "Figure": "evaluation.statistics:Figure",
    "IPO": "objectives:IPO",
    "KTO": "objectives:KTO",
    "KeepAll": "selection:KeepAll",
    "LogProbability": "scoring.scorers:LogProbability",
    "LogRatio": "scoring.scorers:LogRatio",
    "ORPO": "objectives:ORPO",
    "Pairwise": "objectives:Pairwise",
    "PlackettLuce": "objectives:PlackettLuce",
    "Position": "scoring.scorers:Position",
    "Probability": "scoring.scorers:Probability",
    "Random": "scoring.scorers:Random",
    "Reward": "scoring.scorers:Reward",
    "RewardSettings": "models.reward:RewardSettings",
    "Run": "stages.run:Run",
    "SFT": "objectives:SFT",
    "SamplingSettings": "sampling.sampler:SamplingSettings",
    "SePO": "objectives:SePO",
    "SelectiveTrainer": "api.trainer:SelectiveTrainer",
    "SideRule": "selection:SideRule",
    "SimPO": "objectives:SimPO",
    "SoftWeights": "selection:SoftWeights",
    "Spans": "scoring.scorers:Spans",
    "SparsePO": "objectives:SparsePO",
    "Sum": "objectives:Sum",
    "Surprisal": "scoring.scorers:Surprisal",
    "TBPO": "objectives:TBPO",
    "TDPO": "objectives:TDPO",
    "TReg": "objectives:TReg",
    "Threshold": "selection:Threshold",
    "TokenKL": "objectives:TokenKL",
    "TokenRewards": "scoring.export:TokenRewards",
    "TokenScorer": "scoring.texts:TokenScorer",
    "TokenSettings": "api.inputs:TokenSettings",
    "TokenTable": "tokens.table:TokenTable",
    "TokenTrainingArguments": "training.arguments:TokenTrainingArguments",
    "TopFraction": "selection:TopFraction",
    "Transform": "selection:Transform",
    "WeightedLikelihood": "objectives:WeightedLikelihood",
    "evaluate": "api.scored:evaluate",
    "losses": "losses:",
    "make_report": "report.page:make_report",
    "open_run": "tools.run:open_run",
    "read_figures": "stages.evaluation:read_figures",
    "run": "tools.run:run_recipe",
    "score": "api.scored:score",
    "select": "api.scored:select",
    "token_logprobs": "models.logprobs:token_logprobs",
    "train_oracle": "api.training:train_oracle",
    "train_reward": "api.training:train_reward",
}

__all__ = [
    "DPO",
    "IPO",
    "KTO",
    "ORPO",
    "SFT",
    "TBPO",
    "TDPO",
    "Combine",
    "Comparison",
    "Entropy",
    "External",
    "Figure",
    "KeepAll",
    "LogProbability",
    "LogRatio",
    "Message",
    "Pairwise",
    "PlackettLuce",
    "Position",
    "Probability",
    "Random",
    "Reward",
    "RewardSettings",
    "Run",
    "SamplingSettings",
    "SePO",
    "SelectiveTrainer",
    "SideRule",
    "SimPO",
    "SoftWeights",
    "Span",
    "Spans",
    "SparsePO",
    "Sum",
    "Surprisal",
    "TReg",
    "Threshold",
    "TokenKL",
    "TokenRewards",
    "TokenScorer",
    "TokenSettings",
    "TokenTable",
    "TokenTrainingArguments",
    "TopFraction",
    "Transform",
    "UserError",
    "WeightedLikelihood",
    "evaluate",
    "losses",
    "make_report",
    "open_run",
    "read_figures",
    "run",
    "score",
    "select",
    "token_logprobs",
    "train_oracle",
    "train_reward",
]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; the command line's help must not wait for it.
    if name not in _LAZY:
        raise AttributeError(f"module 'tokenward' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    found = importlib.import_module(f"tokenward.{module}")
    return getattr(found, attribute) if attribute else found
