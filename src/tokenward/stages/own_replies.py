"""What a policy in a run on comparisons needs to train on its own replies, and the checks of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokenward.api.values import frozen_values
from tokenward.errors import UserError
from tokenward.models.base import TokenModel
from tokenward.scoring.reads import Value, reads_of
from tokenward.scoring.texts import TokenScorer
from tokenward.selection import KeepAll, Selector, selector_of
from tokenward.stages.auxiliary import auxiliary_of, folder_of, scorer_of
from tokenward.stages.base import Checks
from tokenward.stages.run import Run
from tokenward.stages.sampling_checks import sampling_checks
from tokenward.tokens.rows import TokenRow
from tokenward.types import Comparison

_PLANNED_PROMPTS = 256  # a plan counts the replies to so many prompts, evenly spaced by length


def planned_replies(prompts: Sequence[list[int]], count: int, length: int) -> list[TokenRow]:
    """Prompts with placeholder replies of maximum length; of many prompts, some."""
    ordered = sorted(prompts, key=len, reverse=True)
    size = min(_PLANNED_PROMPTS, len(ordered))
    places = np.unique(np.linspace(0, len(ordered) - 1, size).astype(int))
    made = Comparison(key="", prompt=(), responses=("",) * count, ranks=(0,) * count, source="plan")
    return [TokenRow(made, ordered[place], [[0] * length] * count, [0] * count) for place in places]


def rewards_of(run: Run) -> TokenScorer:
    """The recipe's scorer with its models, for replies that the policy writes."""
    scorer, models = scorer_of(run), dict[str, TokenModel]()
    for value in frozen_values(scorer):
        folder = folder_of(run, value.model)
        models[value] = run.load_reward(folder) if value.model == "reward" else run.load(folder)
    return TokenScorer(models, scorer, run.style, run.passes["precision"])


def own_replies_checks(run: Run) -> Checks:
    """Checks of a policy that trains on its own replies, in a run on comparisons."""
    table = run.recipe.policy
    return {
        "policy.objective": lambda: _check_scorer(run),
        "policy.selection": lambda: _check_selection(selector_of(table.selection, run.recipe.seed)),
        "policy.training.eval_strategy": lambda: _check_no_eval(table.training),
        **sampling_checks(run, table, "policy"),
    }


def _check_scorer(run: Run) -> None:
    """Check that the scorer reads models alone, and of them log-probabilities and rewards, without a prompt of their own."""
    scorer = scorer_of(run)
    read = [value for value in reads_of(scorer) if not _of_replies(run, value)]
    if read or not reads_of(scorer):
        found = f"reads {', '.join(read)}" if read else "reads no model"
        raise UserError(
            f"reinforce scores every reply that the policy writes, and the scorer {run.recipe.scores.scorer.name} {found}. Use {{name: reward}}, "
            "or {name: log_ratio} of an oracle or of auxiliary models.",
            code="wrong-scorer",
        )


def _of_replies(run: Run, value: Value) -> bool:
    """Whether a value can be computed for any reply: a frozen model's log-probability, or the reward."""
    if value.online or value.details or value.model == "data" or auxiliary_of(run, value.model).prompt:
        return False
    return value.kind == ("" if value.model == "reward" else "logp")


def _check_selection(selector: Selector) -> None:
    if not isinstance(selector, KeepAll):
        raise UserError(
            "reinforce trains on every token of the policy's own replies, each with its reward. Write selection: {name: all}.",
            code="conflicting-settings",
        )


def _check_no_eval(table: Mapping[str, Any]) -> None:
    if table.get("eval_strategy", "no") != "no":
        raise UserError(
            "reinforce has no loss on eval rows, because it trains on the policy's own replies. Remove eval_strategy: the evaluation "
            "measures the trained policy.",
            code="unused-key",
        )
