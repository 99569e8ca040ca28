"""The tables of token-level guidance: the reward, what it is learned on, and the loop that trains with it."""

from typing import Annotated, Any, Literal

from pydantic import Field

from tokenward.config.base import TRAINING, Count, Named, NamedTable, Share, Table, Training


class RewardTable(Table):
    """The token reward model, learned from rankings."""

    model: str | None = Field(
        default=None, description="Model whose body it starts from; null is what the policy starts from."
    )
    head: dict[str, Any] = Field(
        default={},
        description="Its head: hidden, gain, bias, bound, low, high, exact_range, unit (token, word, sentence, spans), freeze.",
    )
    objective: NamedTable = Field(
        default=Named(name="plackett_luce"),
        description="Loss of a ranking, with the aggregate of its tokens.",
    )
    fraction: Share = Field(
        default=1.0, description="Share of the ranked data it sees, in a run on comparisons."
    )
    training: Training = TRAINING


class SamplingTable(Table):
    """How the policy's replies are drawn."""

    max_new_tokens: Count = Field(default=64, description="Longest reply.")
    temperature: Annotated[float, Field(gt=0)] = Field(default=1.0, description="Sampling temperature.")
    top_p: Share = Field(
        default=1.0, description="Sample from the likeliest tokens that hold this probability."
    )
    top_k: Annotated[int, Field(ge=0)] = Field(
        default=50, description="Sample from this many tokens; 0 is all."
    )
    stop: list[str] = Field(default=[], description="Texts after which a reply is over.")
    batch: Count = Field(default=64, description="Replies drawn at a time.")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Number type that replies are drawn in."
    )


class ExamplesTable(Table):
    """Prompts to sample replies to, with the texts that good replies are like."""

    source: str | list[str] = Field(description="File, folder or hub name to train on, or a list of files.")
    development: str | list[str] | None = Field(
        default=None, description="Where prompts to choose by come from; null takes a tenth of the source."
    )
    test: str | list[str] | None = Field(
        default=None, description="Where prompts to report on come from; null takes a tenth of the source."
    )
    prompt: str = Field(
        default="{prompt}", description="The user's turn, with columns of the data in braces."
    )
    system: str | None = Field(default=None, description="A system turn before it; null has none.")
    references: str | None = Field(
        default=None, description="Column with the reference text, or a list of them; null has none."
    )
    limit: Count | None = Field(default=None, description="Train on only so many, the first ones.")
    development_limit: Count | None = Field(default=None, description="The same for development.")
    test_limit: Count | None = Field(default=None, description="The same for the test.")
    split: str | None = Field(default=None, description="Split of a data set with several.")
    subset: str | None = Field(default=None, description="Configuration of a hub data set with several.")


class PromptTaskTable(Table):
    """Classification by a frozen model with a discrete prompt."""

    train: str = Field(description="Labelled texts that rank prompts.")
    development: str = Field(description="Labelled texts that choose prompts and set thresholds.")
    test: str = Field(description="Labelled texts that are looked at once, at the end.")
    text: str | list[str] = Field(
        default=["text", "sentence"],
        description="Column of the text, or the names it has in one file or another.",
    )
    label: str = Field(default="label", description="Column of the label, whole numbers from 0.")
    template: str = Field(
        default="{sentence} {prompt}", description="Where text and prompt stand; {mask} for a masked model."
    )
    verbalizers: list[str] = Field(description="One word per class, each a single token.")
    model: str | None = Field(default=None, description="The task model; null is the recipe's model.")
    masked: bool = Field(default=False, description="Whether it is a masked language model.")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Number type of the task model's pass."
    )
    share: Share = Field(default=0.8, description="Share of the training texts that rank prompts at a time.")
    correct: Annotated[float, Field(gt=0)] = Field(default=200.0, description="Factor of a positive gap.")
    wrong: Annotated[float, Field(gt=0)] = Field(default=180.0, description="Factor of any other gap.")
    start: str | None = Field(
        default=None, description="What a prompt continues; null is the tokenizer's first special token."
    )
    candidates: Count = Field(default=16, description="Prompts drawn from the trained policy to choose from.")
    best: Count = Field(default=3, description="How many of them are tested.")
    manual: list[str] = Field(default=[], description="Hand-written prompts to compare with.")
    random: Count = Field(default=16, description="Random prompts to compare with.")
    test_limit: Count | None = Field(default=None, description="Test on only so many texts, the first ones.")
    max_sentence_tokens: Count = Field(default=256, description="A longer text loses its end.")


class OnlineTable(Table):
    """The loop: sample, rank, learn the reward, train the policy with it, and again."""

    source: NamedTable | None = Field(
        default=None,
        description="What ranks the samples: rouge, meteor, chrf, classifier, length, or module:name; a prompt_task has its own.",
    )
    samples: Annotated[int, Field(ge=2)] = Field(
        default=3, description="Replies per prompt that the reward is learned from."
    )
    reward_steps: Count = Field(default=100, description="Updates of the reward each time it is learned.")
    reward_groups: Count | None = Field(
        default=None,
        description="Prompts sampled for each time, gone over again if the updates need more; null samples for every update.",
    )
    development: Count = Field(
        default=32, description="Development prompts that a look at reward or policy samples for."
    )
    reward_evals: Annotated[int, Field(ge=0)] = Field(
        default=5,
        description="Looks at the reward's development loss each time; the best is kept. 0 keeps the last.",
    )
    reward_patience: Count | None = Field(
        default=None, description="Looks without a gain after which the reward stops; null goes on."
    )
    every: Count | None = Field(
        default=None, description="Policy updates after which the reward is learned again; null never does."
    )
    until: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.5, description="Share of the policy's updates after which it is not learned again."
    )
    restart: Literal["warm", "fresh"] = Field(
        default="warm", description="Learn again from the reward before, or from its start."
    )
    evaluate_every: Count | None = Field(
        default=None,
        description="Policy updates between two looks at it; the best is restored. null keeps the last.",
    )
    evaluation_samples: Count = Field(default=1, description="Replies per prompt in such a look.")
    patience: Count | None = Field(
        default=None, description="Looks without a gain after which the policy stops; null goes on."
    )
    rollouts: Count = Field(default=64, description="Replies per prompt in an update by reinforce.")
    sampler: NamedTable = Field(
        default=Named(name="transformers"), description="What draws replies, or module:Name."
    )
    sampling: SamplingTable = Field(default=SamplingTable(), description="How they are drawn.")
    selection: NamedTable = Field(
        default=Named(name="soft"), description="From rewards to token weights, in weighted likelihood."
    )
    objective: NamedTable = Field(
        default=Named(name="weighted_likelihood"), description="weighted_likelihood, or reinforce."
    )
    training: Training = TRAINING
