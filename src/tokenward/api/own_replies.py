"""Training on the policy's own replies: they are sampled at every step, and every token gets its reward."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import TrainingArguments

from tokenward.api.constant import Say
from tokenward.distributed import alone, gather, place
from tokenward.errors import UserError
from tokenward.models.base import TokenModel
from tokenward.models.loading import LanguageModel
from tokenward.objectives import Objective, Reinforce
from tokenward.sampling.classification import MaskedModel
from tokenward.sampling.rollouts import Context, ScoredSampler, sampled_row, seed_of
from tokenward.scoring.reads import token_values
from tokenward.scoring.texts import TokenScorer
from tokenward.tokens.rows import TokenRow
from tokenward.training.passes import Prepare
from tokenward.types import Example

DEVICE_BATCH = TrainingArguments.per_device_train_batch_size
"""Rows of a batch if the training arguments do not say, as in transformers."""


def check_baseline(objective: Objective, rollouts: int) -> None:
    """Refuse a baseline over the replies to a prompt if there is only one.

    ``mean`` would subtract the reply's own rewards, and ``leave_one_out`` has no other reply.
    """
    if rollouts == 1 and isinstance(objective, Reinforce) and objective.baseline != "none":
        why = {
            "mean": "the mean over the replies to a prompt, which is then the reply's own, so nothing would be learned",
            "leave_one_out": "the mean over the other replies to a prompt, and there are none",
        }[objective.baseline]
        raise UserError(
            f"rollouts is 1, and baseline: {objective.baseline} subtracts {why}. Sample more replies, or use baseline: none.",
            code="conflicting-settings",
        )


@dataclass(kw_only=True)
class OwnReplies:
    """Makes training rows of a step's prompts: replies of the policy of that step, with the reward of each token.

    Attributes:
        samples: Samples the replies.
        count: Replies to a prompt.
        rewards: Gives the reward of each token.
        examples: The prompts' examples by key.
        seed: Of the replies; each step has one of its own.
        precision: Number type of the reference's passes, as in :func:`tokenward.scoring.reads.over_batches`.
        tokens_per_batch: Most tokens in a pass of the reference or the rewards.
        say: Shows a line.
        reference: Gives the log-probabilities for a KL penalty; None without one.
        empty: How many replies were empty so far; they do not train.
    """

    samples: ScoredSampler
    count: int
    rewards: TokenScorer
    examples: Mapping[str, Example]
    seed: int
    precision: str
    tokens_per_batch: int
    say: Say
    reference: LanguageModel | None = None
    empty: int = 0

    def __call__(self, rows: Sequence[TokenRow], step: int) -> list[TokenRow]:
        """Rows with replies, for rows that have a prompt."""
        contexts = [Context(self.examples[row.comparison.key], row.prompt) for row in rows]
        scored = rewarded(self.rewards, self._sampled(contexts, step), self.tokens_per_batch)
        if self.reference is None:
            return scored
        values = token_values(
            self.reference,
            scored,
            precision=self.precision,
            tokens_per_batch=self.tokens_per_batch,
            shared=True,
        )
        return [replace(row, reference_logp=value) for row, value in zip(scored, values, strict=True)]

    def _sampled(self, contexts: Sequence[Context], step: int) -> list[TokenRow]:
        # The last number was that of a process; it stays, so that the replies to a seed stay.
        seed, asked = seed_of(self.seed, "rollout", step, 0), len(contexts) * self.count
        prompts = [context.prompt for context in contexts]
        replies = self.samples.replies(prompts, count=self.count, seed=seed)
        empty = asked - sum(map(len, replies))
        if empty and not self.empty:
            self.say(
                f"  step {step}: {empty} of {asked} replies are empty and do not train. Further ones are counted, and their number is "
                "shown at the end"
            )
        self.empty += empty
        return [sampled_row(context, group) for context, group in zip(contexts, replies, strict=True)]

    def show(self) -> None:
        """Say how many replies were empty."""
        if self.empty:
            self.say(f"  empty replies that did not train: {self.empty}")


def rewarded(rewards: TokenScorer, rows: Sequence[TokenRow], tokens_per_batch: int) -> list[TokenRow]:
    """Rows with the reward of each token as its score."""
    values = rewards.of_rows(rows, tokens_per_batch=tokens_per_batch, shared=True)
    return [replace(row, scores=value) for row, value in zip(rows, values, strict=True)]


def check_same_tokens(policy: LanguageModel, other: TokenModel | MaskedModel, what: str, key: str) -> None:
    """Check that another model reads the ids that the policy samples as the same tokens.

    Raises:
        UserError: the vocabularies differ.
    """
    if policy.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise UserError(
            f"the {what} {other.name} has another vocabulary than {policy.name}, so it would read the policy's token ids as other "
            "tokens. Use a model with the same tokenizer.",
            code="other-vocabulary",
            key=key,
        )


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
