"""The tables of a recipe: every key with its type, default and a one-line description."""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BeforeValidator, Field
from pydantic.fields import FieldInfo

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
    training_table,
)
from tokenward.config.online import ExamplesTable, OnlineTable, PromptTaskTable, RewardTable, RolloutSettings

RENAMED: dict[str, str] = {
    "data.held_out": "data.eval",
    "experts": "auxiliary_models",
    "auxiliary_models.NAME.picks": "subset",
    "auxiliary_models.NAME.swapped": "swap_labels",
    "experts.NAME.picks": "subset",
    "experts.NAME.swapped": "swap_labels",
    "guidance": "online",
    "guidance.reward_looks": "online.reward_evals",
    "online.reward_looks": "online.reward_evals",
    "model.rows": "model.packing, with shared_prompts for shared and none for separate",
    "referee": "eval_reward",
}
"""Old keys and their new names. An entry is kept for two minor releases."""


class ModelTable(Settings):
    """The model that a run starts from, and how it is loaded."""

    name: str = key("Folder or hub name; default is the built-in model.", "default")
    dtype: Literal["float32", "bfloat16", "auto"] = key(
        "Data type of the weights; auto is the one in which the model was saved.", "float32"
    )
    device: str = key("auto, cpu, cuda, cuda:1 or mps.", "auto")
    attention: str = key(
        "Attention implementation of transformers; auto is sdpa, or eager where the model does not support it.",
        "auto",
    )
    packing: Literal["auto", "shared_prompts", "none"] = key(
        "Compute a prompt once for all of its responses (shared_prompts) or once for each (none).", "auto"
    )
    trust_remote_code: bool = key("Run code that comes with a model.", False)
    adapter: dict[str, Any] | None = key("Fields of peft.LoraConfig; null trains every weight.", None)
    head_mlp: dict[str, Any] | None = key(
        "Train a small MLP before the head of the frozen model: hidden, gain, bias, residual.", None
    )


class EvalTable(Settings):
    """Eval rows from a separate source or split."""

    source: str | list[str] | None = key(
        "As data.source; null reads data.source, so that split must name another split of it.", None
    )
    split: str | None = key("As data.split.", None)
    subset: str | None = key("As data.subset.", None)
    limit: Count | None = key("As data.limit.", None)
    format: str | None = key("As data.format; null uses that one.", None)
    columns: dict[str, str] | None = key("As data.columns; null uses those.", None)


class DataTable(Settings):
    """The comparisons, and which of them to use."""

    source: str | list[str] = key("File, folder or hub name, or a list of files.", "builtin")
    format: str = key("Data format; auto detects it from the columns.", "auto")
    columns: dict[str, str] = key("tokenward's column name -> column name in the source.", {})
    split: str | None = key("Split to read; null is train, or the only one.", None)
    subset: str | None = key("Folder inside the source, or configuration of a hub data set.", None)
    limit: Count | None = key("Maximum number of rows to read; takes the first.", None)
    eval: Annotated[float, Field(ge=0, lt=1)] | EvalTable = key(
        "Fraction of the prompts kept for evaluation, or a table that names a separate source or split.", 0.1
    )
    pairs: Literal["best_worst", "all", "adjacent"] = key(
        "Which pairs to form if a prompt has more than two ranked responses.", "best_worst"
    )
    min_gap: float | None = key("Drop pairs whose scores in the data differ by less than this.", None)


class TokensTable(Settings):
    """How text becomes token ids."""

    template: Literal["chat", "plain"] = key("Apply the chat template, or use the bare text.", "chat")
    chat_template_kwargs: dict[str, Any] = key(
        "Variables of the chat template, such as enable_thinking or a date; tools is used for rows without their own.",
        {},
    )
    max_prompt_tokens: Count = key("Maximum length of a prompt.", 1024)
    max_response_tokens: Count = key("Maximum length of a response.", 512)
    too_long: Literal["drop", "truncate", "error"] = key("What to do with longer rows.", "drop")
    processes: Count | None = key(
        "Worker processes for encoding; null chooses by cores and data size. Does not affect results.", None
    )


class SftTable(Settings):
    """Supervised fine-tuning on the preferred responses, before all other training."""

    training: Training = TRAINING


class OracleTable(Settings):
    """The model that estimates token rewards, trained on a fraction of the comparisons."""

    model: str | None = key("Model to start from; null uses the recipe's model.", None)
    fraction: Share = key("Fraction of the training comparisons to train on.", 1.0)
    objective: NamedTable = key("Training objective.", Named(name="dpo"))
    adapter: Literal["inherit"] | dict[str, Any] | None = key(
        "As model.adapter; inherit uses that one.", "inherit"
    )
    training: Training = TRAINING


class SubsetTable(Settings):
    """Comparisons that a scorer selects as training data of an auxiliary model."""

    scorer: NamedTable = key(
        "Scores the tokens; it may read any model that exists before this auxiliary model is trained.",
        Named(name="log_ratio"),
    )
    side: Literal["chosen", "rejected", "both"] = key(
        "Which responses are scored. That side is trained as the preferred one; with both, swap_labels decides.",
        "chosen",
    )
    pair_score: Literal["largest", "mean", "sum"] = key(
        "Reduces the token scores of a comparison to one number.", "largest"
    )
    fraction: Share | None = key(
        "Fraction of the training comparisons to select, highest scores first. Excludes count.", None
    )
    count: Count | None = key(
        "Number of comparisons to select, highest scores first. Excludes fraction.", None
    )
    alone: bool = key("Train on the subset only, without the auxiliary model's own fraction.", False)


class AuxiliaryModelTable(Settings):
    """A further model that scorers can read by its name."""

    model: str | None = key("Folder or hub name; null uses the reference.", None)
    prompt: str | None = key(
        "Text with {prompt} that replaces the last user turn; null leaves it unchanged.", None
    )
    training: Annotated[dict[str, Any] | None, BeforeValidator(training_table)] = key(
        "Train it, with these fields of transformers.TrainingArguments; null uses model as it is.", None
    )
    objective: NamedTable = key("Training objective.", Named(name="dpo"))
    swap_labels: bool = key("Train with chosen and rejected responses swapped.", False)
    fraction: Share = key("Fraction of the training comparisons to train on.", 1.0)
    subset: SubsetTable | None = key("Comparisons that a scorer selects to train on; null means none.", None)
    adapter: Literal["inherit"] | dict[str, Any] | None = key(
        "As model.adapter; inherit uses that one.", "inherit"
    )


class ScoresTable(Settings):
    """One stored score per response token."""

    scorer: NamedTable = key("Scores the tokens.", Named(name="log_ratio"))
    precision: Literal["float32", "bfloat16"] = key("Data type of the forward pass.", "float32")
    tokens_per_batch: Count = key("Maximum number of tokens per forward pass.", 8192)
    shard_rows: Count = key("Prompts per file of the store; a stopped stage resumes at the next file.", 128)


class PolicyTable(RolloutSettings):
    """The model that the run produces. Its own replies train it only with the objective reinforce."""

    model: str | None = key("Model to start from; null uses the recipe's model.", None)
    selection: NamedTable = key("Turns scores into token weights.", Named(name="top_fraction"))
    objective: NamedTable = key("Training objective.", Named(name="sepo"))
    training: Training = TRAINING


class EvalRewardTable(Settings):
    """A second oracle, trained on separate comparisons, that evaluates the policy."""

    fraction: Annotated[float, Field(gt=0, lt=1)] = key(
        "Fraction of the training comparisons reserved for it.", 0.3
    )
    objective: NamedTable = key("Training objective.", Named(name="dpo"))
    training: Training = TRAINING


class EvaluationTable(Settings):
    """What is measured on the eval rows."""

    prompts: Count = key("Eval prompts to generate replies for.", 128)
    max_new_tokens: Count = key("Maximum length of a reply, in tokens.", 64)
    temperature: Positive = key("Sampling temperature; use top_k 1 for greedy decoding.", 1.0)
    top_p: Share = key("Nucleus sampling: probability mass to sample from.", 1.0)
    top_k: NotNegative = key("Number of most likely tokens to sample from; 0 is all.", 0)
    precision: Literal["float32", "bfloat16"] = key(
        "Data type for generating replies; bfloat16 is faster on most GPUs.", "float32"
    )
    metrics: list[str] = key("Metrics of the generated text, by name.", [])
    bootstrap: Count = key("Bootstrap resamples per confidence interval.", 2000)
    batch: Count = key("Replies generated per batch.", 64)
    sampler: NamedTable = key(
        "Samples the replies: transformers, server or vllm.", Named(name="transformers")
    )


class Recipe(Settings):
    """A whole run."""

    run: str = key("Folder of the run; defaults to runs/ and the name of the recipe file.", "runs/recipe")
    seed: NotNegative = key("Random seed.", 0)
    fixed_prompts: NotNegative = key(
        "Eval prompts to answer during training: at the start, at each evaluation and at the end. 0 turns it off.",
        8,
    )
    model: ModelTable = key("The model to start from.", ModelTable())
    data: DataTable = key("The comparisons.", DataTable())
    tokens: TokensTable = key("How text becomes tokens.", TokensTable())
    sft: SftTable | None = key("Supervised fine-tuning first; null skips it.", None)
    oracle: OracleTable = key("The model that estimates token rewards.", OracleTable())
    auxiliary_models: dict[str, AuxiliaryModelTable] = key(
        "Further models that scorers can read, by name.", {}
    )
    reward: RewardTable = key("The token reward model, if a scorer reads it.", RewardTable())
    scores: ScoresTable = key("The token scores.", ScoresTable())
    policy: PolicyTable = key("The model that the run produces.", PolicyTable())
    eval_reward: EvalRewardTable | None = key("A second oracle for evaluation; null skips it.", None)
    examples: ExamplesTable | None = key("Prompts, with optional references, of an online run.", None)
    prompt_task: PromptTaskTable | None = key(
        "Classification with a discrete prompt, in an online run.", None
    )
    online: OnlineTable | None = key(
        "Alternately learn a reward from ranked samples and train with it; null is a run on comparisons.",
        None,
    )
    evaluation: EvaluationTable = key("What is measured.", EvaluationTable())


def table_of(field: FieldInfo) -> type[Settings] | None:
    """The class of the table that a field holds; None for a value or for tables by user-chosen names."""
    if get_origin(field.annotation) is dict:
        return None
    return _table_in((field.annotation, *get_args(field.annotation)))


def named_table_of(field: FieldInfo) -> type[Settings] | None:
    """The class of the tables that a field holds by user-chosen names, or None."""
    return _table_in(get_args(field.annotation)) if get_origin(field.annotation) is dict else None


def _table_in(kinds: Iterable[Any]) -> type[Settings] | None:
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Settings)), None)


ANY_NAME = "NAME"
"""Placeholder for a user-chosen name in the dotted keys of the schema."""


def schema_fields(
    table: type[Settings] = Recipe, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[str, FieldInfo]]:
    """Every key of a recipe with its dotted path; a table comes before its keys."""
    for name, field in table.model_fields.items():
        path = (*prefix, name)
        yield ".".join(path), field
        inner, named = table_of(field), named_table_of(field)
        if inner is not None:
            yield from schema_fields(inner, path)
        if named is not None:
            yield from schema_fields(named, (*path, ANY_NAME))
