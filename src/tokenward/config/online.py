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
    key,
)


class RewardTable(Settings):
    """The token reward model, learned from rankings."""

    model: str | None = key("Model to initialize the body from; null takes the policy's.", None)
    head: dict[str, Any] = key(
        "Reward head: hidden, gain, bias, bound, low, high, exact_range, unit (token, word, sentence or spans), freeze.",
        {},
    )
    objective: NamedTable = key(
        "Ranking loss, and how it aggregates the rewards of a reply's tokens.", Named(name="plackett_luce")
    )
    fraction: Share = key("Fraction of the ranked lists to train on, in a run on comparisons.", 1.0)
    training: Training = TRAINING


class SamplingTable(Settings):
    """How replies are sampled from the policy."""

    max_new_tokens: Count = key("Maximum length of a reply, in tokens.", 64)
    temperature: Positive = key("Sampling temperature.", 1.0)
    top_p: Share = key("Nucleus sampling: probability mass to sample from.", 1.0)
    top_k: NotNegative = key("Number of most likely tokens to sample from; 0 is all.", 0)
    stop: list[str] = key("Strings that end a reply.", [])
    batch: Count = key("Replies sampled per batch.", 64)
    precision: Literal["float32", "bfloat16"] = key("Data type for sampling.", "float32")


class ExamplesTable(Settings):
    """Prompts to sample replies to, with optional reference texts."""

    source: str | list[str] = key("File, folder or hub name to train on, or a list of files.")
    development: str | list[str] | None = key(
        "Source of the development prompts; null takes a tenth of source.", None
    )
    test: str | list[str] | None = key("Source of the test prompts; null takes a tenth of source.", None)
    prompt: str = key("Template of the user turn, with column names in braces.", "{prompt}")
    system: str | None = key("System message; null sends none.", None)
    references: str | None = key(
        "Column with the reference text or a list of them; null means no references.", None
    )
    limit: Count | None = key("Maximum number of training rows; takes the first.", None)
    development_limit: Count | None = key("As limit, for development.", None)
    test_limit: Count | None = key("As limit, for the test.", None)
    split: str | None = key("Split of a data set that has several.", None)
    subset: str | None = key("Configuration of a hub data set that has several.", None)


class PromptTaskTable(Settings):
    """Classification by a frozen model with a discrete prompt, which the policy writes."""

    train: str = key("Labelled texts for ranking prompts.")
    development: str = key("Labelled texts for choosing prompts and calibrating thresholds.")
    test: str = key("Labelled texts for the final evaluation.")
    text: str | list[str] = key("Column of the text; a list gives alternative names.", ["text", "sentence"])
    label: str = key("Column of the label: integers from 0.", "label")
    template: str = key("Input of the task model; a masked model also needs {mask}.", "{sentence} {prompt}")
    verbalizers: list[str] = key("One word per class, each a single token.")
    model: str | None = key("The task model; null uses the recipe's model.", None)
    masked: bool = key("Whether the task model is a masked language model.", False)
    precision: Literal["float32", "bfloat16"] = key("Data type of the task model's forward pass.", "float32")
    share: Share = key("Fraction of the training texts used for each ranking.", 0.8)
    correct: Positive = key("Scale of a positive gap.", 200.0)
    wrong: Positive = key("Scale of any other gap.", 180.0)
    start: str | None = key("Text that a prompt continues; null is the tokenizer's bos (or eos) token.", None)
    candidates: Count = key("Prompts sampled from the trained policy.", 16)
    best: Count = key("Number of candidates to test.", 3)
    manual: list[str] = key("Hand-written prompts to compare with.", [])
    random: Count = key("Number of random prompts to compare with.", 16)
    test_limit: Count | None = key("Maximum number of test texts; takes the first.", None)
    max_sentence_tokens: Count = key("Texts are truncated to this many tokens.", 256)


class RolloutSettings(Settings):
    """How a policy that trains on its own replies samples them."""

    rollouts: Count = key("Replies per prompt in each step of reinforce.", 4)
    sampler: NamedTable = key(
        "Samples the replies: transformers, server, vllm or module:Name.", Named(name="transformers")
    )
    sampling: SamplingTable = key("Sampling settings.", SamplingTable())


class OnlineTable(RolloutSettings):
    """The alternating loop: sample, rank, learn the reward, train the policy with it, repeat."""

    source: NamedTable | None = key(
        "Ranks the samples: rouge, meteor, chrf, classifier, length or module:name. A prompt_task has its own.",
        None,
    )
    reward: str | None = key(
        "Folder of a token reward that was learned before, used as it is: a reward, or an oracle, whose log ratio to its reference "
        "is the reward. null learns one from the source's rankings.",
        None,
    )
    samples: Annotated[int, Field(ge=2)] = key("Replies sampled per prompt to learn the reward from.", 3)
    reward_steps: Count = key("Optimizer steps each time the reward is learned.", 100)
    reward_groups: Count | None = key(
        "Prompts to sample for each time, reused if the steps need more; null samples new ones for every step.",
        None,
    )
    development: Count = key("Development prompts for each evaluation of the reward or policy.", 32)
    reward_evals: NotNegative = key(
        "Evaluations of the reward's development loss each time; the best reward is kept. 0 keeps the last.",
        5,
    )
    reward_patience: Count | None = key(
        "Evaluations without improvement before the reward stops; null never stops early.", None
    )
    every: Count | None = key(
        "Policy steps after which the reward is learned again; null learns it once.", None
    )
    until: Annotated[float, Field(ge=0, le=1)] = key(
        "Fraction of the policy's steps after which the reward is no longer updated.", 0.5
    )
    restart: Literal["warm", "fresh"] = key(
        "Continue from the current reward (warm), or from its start (fresh).", "warm"
    )
    evaluate_every: Count | None = key(
        "Policy steps between evaluations; the best policy is restored. null keeps the last.", None
    )
    evaluation_samples: Count = key("Replies per prompt in such an evaluation.", 1)
    patience: Count | None = key(
        "Evaluations without improvement before the policy stops; null never stops early.", None
    )
    rollouts: Count = key("Replies per prompt in each step of reinforce.", 64)
    selection: NamedTable = key(
        "Turns rewards into token weights for weighted_likelihood.", Named(name="soft")
    )
    objective: NamedTable = key("weighted_likelihood or reinforce.", Named(name="weighted_likelihood"))
    training: Training = TRAINING
