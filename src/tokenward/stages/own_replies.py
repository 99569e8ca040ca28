"""Training on the policy's own replies: they are sampled at every step, and every token gets its reward."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import TrainingArguments

from tokenward.api.values import frozen_values
from tokenward.distributed import alone, gather, place
from tokenward.errors import UserError
from tokenward.models.base import TokenModel
from tokenward.models.loading import LanguageModel
from tokenward.sampling.rollouts import Context, ScoredSampler, sampled_row, seed_of
from tokenward.scoring.reads import Value, reads_of, token_values
from tokenward.scoring.texts import TokenScorer
from tokenward.selection import KeepAll, Selector, selector_of
from tokenward.stages.auxiliary import auxiliary_of, folder_of, scorer_of
from tokenward.stages.base import Checks
from tokenward.stages.run import Run
from tokenward.stages.sampling_checks import sampling_checks
from tokenward.tokens.rows import TokenRow
from tokenward.training.passes import Prepare
from tokenward.types import Comparison, Example

DEVICE_BATCH = TrainingArguments.per_device_train_batch_size
"""Rows of a batch if the training table does not say, as in transformers."""

_PLANNED_PROMPTS = 256  # a plan counts the replies to so many prompts, evenly spaced by length


@dataclass(kw_only=True)
class OwnReplies:
    """Makes training rows of a step's prompts: replies of the policy of that step, with the reward of each token.

    Attributes:
        run: The run.
        samples: Samples the replies.
        count: Replies to a prompt.
        rewards: Gives the reward of each token.
        examples: The prompts' examples by key.
        reference: Gives the log-probabilities for a KL penalty; None without one.
        empty: How many replies were empty so far; they do not train.
    """

    run: Run
    samples: ScoredSampler
    count: int
    rewards: TokenScorer
    examples: Mapping[str, Example]
    reference: LanguageModel | None = None
    empty: int = 0

    def __call__(self, rows: Sequence[TokenRow], step: int) -> list[TokenRow]:
        """Rows with replies, for rows that have a prompt."""
        contexts = [Context(self.examples[row.comparison.key], row.prompt) for row in rows]
        scored = rewarded(self.run, self.rewards, self._sampled(contexts, step))
        if self.reference is None:
            return scored
        values = token_values(self.reference, scored, shared=True, **self.run.passes)
        return [replace(row, reference_logp=value) for row, value in zip(scored, values, strict=True)]

    def _sampled(self, contexts: Sequence[Context], step: int) -> list[TokenRow]:
        # The last number was that of a process; it stays, so that the replies to a seed stay.
        seed, asked = seed_of(self.run.recipe.seed, "rollout", step, 0), len(contexts) * self.count
        prompts = [context.prompt for context in contexts]
        replies = self.samples.replies(prompts, count=self.count, seed=seed)
        empty = asked - sum(map(len, replies))
        if empty and not self.empty:
            self.run.display.line(
                f"  step {step}: {empty} of {asked} replies are empty and do not train. Further ones are counted, and their number is "
                "shown at the end"
            )
        self.empty += empty
        return [sampled_row(context, group) for context, group in zip(contexts, replies, strict=True)]

    def show(self) -> None:
        """Say how many replies were empty."""
        if self.empty:
            self.run.display.line(f"  empty replies that did not train: {self.empty}")


def rewarded(run: Run, rewards: TokenScorer, rows: Sequence[TokenRow]) -> list[TokenRow]:
    """Rows with the reward of each token as its score."""
    values = rewards.of_rows(rows, tokens_per_batch=run.passes["tokens_per_batch"], shared=True)
    return [replace(row, scores=value) for row, value in zip(rows, values, strict=True)]


def of_all_processes(made: Prepare, rows: Sequence[TokenRow], size: int) -> Prepare:
    """Makes the rows of a step as one process would: every process makes them all, in shares, and takes its own.

    Args:
        made: Makes training rows of the rows of a whole step.
        rows: All rows of the training.
        size: Rows of a batch in each process.
    """
    if alone():
        return made
    known = {row.comparison.key: row for row in rows}

    def own(rows: Sequence[TokenRow], step: int) -> Sequence[TokenRow]:
        every, mine = _of_step([row.comparison.key for row in rows], size)
        found = made([known[key] for key in every], step)
        return [found[number] for number in mine]

    return own


def _of_step(keys: list[str], size: int) -> tuple[list[str], list[int]]:
    """The rows of a step in all processes, in the order of one process, and the places of those of this one."""
    shares = [[rows[i : i + size] for i in range(0, len(rows), size)] for rows in gather(keys)]
    every: list[str] = []
    mine: list[int] = []
    for batch in range(max(map(len, shares))):
        for rank, share in enumerate(shares):
            rows = share[batch] if batch < len(share) else []
            mine += range(len(every), len(every) + len(rows)) if rank == place().rank else []
            every += rows
    return every, mine


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
