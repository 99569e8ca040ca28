"""Tables of online runs (TLM): the reward, the prompts, the prompt task and the alternating loop."""

from typing import Annotated, Any, Literal

from pydantic import Field

from tokenward.config.base import (
    TRAINING,
    Count,
    Named,
    NamedTable,
    NotNegative,
    Positive,
    Settings,
    Share,
    Training,
)


class RewardTable(Settings):
    """The token reward model, learned from rankings."""

    model: str | None = Field(
        default=None, description="Model to initialize the body from; null takes the policy's."
    )
    head: dict[str, Any] = Field(
        default={},
        description="Reward head: hidden, gain, bias, bound, low, high, exact_range, unit (token, word, sentence or spans), freeze.",
    )
    objective: NamedTable = Field(
        default=Named(name="plackett_luce"),
        description="Ranking loss, and how it aggregates the rewards of a reply's tokens.",
    )
    fraction: Share = Field(
        default=1.0, description="Fraction of the ranked lists to train on, in a run on comparisons."
    )
    training: Training = TRAINING


class SamplingTable(Settings):
    """How replies are sampled from the policy."""

    max_new_tokens: Count = Field(default=64, description="Maximum length of a reply, in tokens.")
    temperature: Positive = Field(default=1.0, description="Sampling temperature.")
    top_p: Share = Field(default=1.0, description="Nucleus sampling: probability mass to sample from.")
    top_k: NotNegative = Field(
        default=50, description="Number of most likely tokens to sample from; 0 is all."
    )
    stop: list[str] = Field(default=[], description="Strings that end a reply.")
    batch: Count = Field(default=64, description="Replies sampled per batch.")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Data type for sampling."
    )


class ExamplesTable(Settings):
    """Prompts to sample replies to, with optional reference texts."""

    source: str | list[str] = Field(description="File, folder or hub name to train on, or a list of files.")
    development: str | list[str] | None = Field(
        default=None, description="Source of the development prompts; null takes a tenth of source."
    )
    test: str | list[str] | None = Field(
        default=None, description="Source of the test prompts; null takes a tenth of source."
    )
    prompt: str = Field(
        default="{prompt}", description="Template of the user turn, with column names in braces."
    )
    system: str | None = Field(default=None, description="System message; null sends none.")
    references: str | None = Field(
        default=None,
        description="Column with the reference text or a list of them; null means no references.",
    )
    limit: Count | None = Field(default=None, description="Maximum number of training rows; takes the first.")
    development_limit: Count | None = Field(default=None, description="As limit, for development.")
    test_limit: Count | None = Field(default=None, description="As limit, for the test.")
    split: str | None = Field(default=None, description="Split of a data set that has several.")
    subset: str | None = Field(default=None, description="Configuration of a hub data set that has several.")


class PromptTaskTable(Settings):
    """Classification by a frozen model with a discrete prompt, which the policy writes."""

    train: str = Field(description="Labelled texts for ranking prompts.")
    development: str = Field(description="Labelled texts for choosing prompts and calibrating thresholds.")
    test: str = Field(description="Labelled texts for the final evaluation.")
    text: str | list[str] = Field(
        default=["text", "sentence"], description="Column of the text; a list gives alternative names."
    )
    label: str = Field(default="label", description="Column of the label: integers from 0.")
    template: str = Field(
        default="{sentence} {prompt}",
        description="Input of the task model; a masked model also needs {mask}.",
    )
    verbalizers: list[str] = Field(description="One word per class, each a single token.")
    model: str | None = Field(default=None, description="The task model; null uses the recipe's model.")
    masked: bool = Field(default=False, description="Whether the task model is a masked language model.")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Data type of the task model's forward pass."
    )
    share: Share = Field(default=0.8, description="Fraction of the training texts used for each ranking.")
    correct: Positive = Field(default=200.0, description="Scale of a positive gap.")
    wrong: Positive = Field(default=180.0, description="Scale of any other gap.")
    start: str | None = Field(
        default=None, description="Text that a prompt continues; null is the tokenizer's bos (or eos) token."
    )
    candidates: Count = Field(default=16, description="Prompts sampled from the trained policy.")
    best: Count = Field(default=3, description="Number of candidates to test.")
    manual: list[str] = Field(default=[], description="Hand-written prompts to compare with.")
    random: Count = Field(default=16, description="Number of random prompts to compare with.")
    test_limit: Count | None = Field(
        default=None, description="Maximum number of test texts; takes the first."
    )
    max_sentence_tokens: Count = Field(default=256, description="Texts are truncated to this many tokens.")


class OnlineTable(Settings):
    """The alternating loop: sample, rank, learn the reward, train the policy with it, repeat."""

    source: NamedTable | None = Field(
        default=None,
        description="Ranks the samples: rouge, meteor, chrf, classifier, length or module:name. A prompt_task has its own.",
    )
    samples: Annotated[int, Field(ge=2)] = Field(
        default=3, description="Replies sampled per prompt to learn the reward from."
    )
    reward_steps: Count = Field(default=100, description="Optimizer steps each time the reward is learned.")
    reward_groups: Count | None = Field(
        default=None,
        description="Prompts to sample for each time, reused if the steps need more; null samples new ones for every step.",
    )
    development: Count = Field(
        default=32, description="Development prompts for each evaluation of the reward or policy."
    )
    reward_evals: NotNegative = Field(
        default=5,
        description="Evaluations of the reward's development loss each time; the best reward is kept. 0 keeps the last.",
    )
    reward_patience: Count | None = Field(
        default=None,
        description="Evaluations without improvement before the reward stops; null never stops early.",
    )
    every: Count | None = Field(
        default=None, description="Policy steps after which the reward is learned again; null learns it once."
    )
    until: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.5, description="Fraction of the policy's steps after which the reward is no longer updated."
    )
    restart: Literal["warm", "fresh"] = Field(
        default="warm", description="Continue from the current reward (warm), or from its start (fresh)."
    )
    evaluate_every: Count | None = Field(
        default=None,
        description="Policy steps between evaluations; the best policy is restored. null keeps the last.",
    )
    evaluation_samples: Count = Field(default=1, description="Replies per prompt in such an evaluation.")
    patience: Count | None = Field(
        default=None,
        description="Evaluations without improvement before the policy stops; null never stops early.",
    )
    rollouts: Count = Field(default=64, description="Replies per prompt in each step of reinforce.")
    sampler: NamedTable = Field(
        default=Named(name="transformers"), description="Samples the replies: transformers or module:Name."
    )
    sampling: SamplingTable = Field(default=SamplingTable(), description="Sampling settings.")
    selection: NamedTable = Field(
        default=Named(name="soft"), description="Turns rewards into token weights for weighted_likelihood."
    )
    objective: NamedTable = Field(
        default=Named(name="weighted_likelihood"), description="weighted_likelihood or reinforce."
    )
    training: Training = TRAINING
