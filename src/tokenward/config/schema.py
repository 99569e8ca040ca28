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
    training_table,
)
from tokenward.config.online import ExamplesTable, OnlineTable, PromptTaskTable, RewardTable

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

    name: str = Field(default="default", description="Folder or hub name; default is the built-in model.")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Data type of the weights.")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1 or mps.")
    attention: str = Field(default="sdpa", description="Attention implementation of transformers.")
    packing: Literal["auto", "shared_prompts", "none"] = Field(
        default="auto",
        description="Compute a prompt once for all of its responses (shared_prompts) or once for each (none).",
    )
    trust_remote_code: bool = Field(default=False, description="Run code that comes with a model.")
    adapter: dict[str, Any] | None = Field(
        default=None, description="Fields of peft.LoraConfig; null trains every weight."
    )
    head_mlp: dict[str, Any] | None = Field(
        default=None,
        description="Train a small MLP before the head of the frozen model: hidden, gain, bias, residual.",
    )


class EvalTable(Settings):
    """Eval rows from a separate source or split."""

    source: str | list[str] | None = Field(
        default=None,
        description="As data.source; null reads data.source, so that split must name another split of it.",
    )
    split: str | None = Field(default=None, description="As data.split.")
    subset: str | None = Field(default=None, description="As data.subset.")
    limit: Count | None = Field(default=None, description="As data.limit.")
    format: str | None = Field(default=None, description="As data.format; null uses that one.")
    columns: dict[str, str] | None = Field(default=None, description="As data.columns; null uses those.")


class DataTable(Settings):
    """The comparisons, and which of them to use."""

    source: str | list[str] = Field(
        default="builtin", description="File, folder or hub name, or a list of files."
    )
    format: str = Field(default="auto", description="Data format; auto detects it from the columns.")
    columns: dict[str, str] = Field(
        default={}, description="tokenward's column name -> column name in the source."
    )
    split: str | None = Field(default=None, description="Split to read; null is train, or the only one.")
    subset: str | None = Field(
        default=None, description="Folder inside the source, or configuration of a hub data set."
    )
    limit: Count | None = Field(default=None, description="Maximum number of rows to read; takes the first.")
    eval: Annotated[float, Field(ge=0, lt=1)] | EvalTable = Field(
        default=0.1,
        description="Fraction of the prompts kept for evaluation, or a table that names a separate source or split.",
    )
    pairs: Literal["best_worst", "all", "adjacent"] = Field(
        default="best_worst",
        description="Which pairs to form if a prompt has more than two ranked responses.",
    )
    min_gap: float | None = Field(
        default=None, description="Drop pairs whose scores in the data differ by less than this."
    )


class TokensTable(Settings):
    """How text becomes token ids."""

    template: Literal["chat", "plain"] = Field(
        default="chat", description="Apply the chat template, or use the bare text."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default={},
        description="Variables of the chat template, such as enable_thinking or a date; tools is used for rows without their own.",
    )
    max_prompt_tokens: Count = Field(default=1024, description="Maximum length of a prompt.")
    max_response_tokens: Count = Field(default=512, description="Maximum length of a response.")
    too_long: Literal["drop", "truncate", "error"] = Field(
        default="drop", description="What to do with longer rows."
    )
    processes: Count | None = Field(
        default=None,
        description="Worker processes for encoding; null chooses by cores and data size. Does not affect results.",
    )


class SftTable(Settings):
    """Supervised fine-tuning on the preferred responses, before all other training."""

    training: Training = TRAINING


class OracleTable(Settings):
    """The model that estimates token rewards, trained on a fraction of the comparisons."""

    model: str | None = Field(default=None, description="Model to start from; null uses the recipe's model.")
    fraction: Share = Field(default=1.0, description="Fraction of the training comparisons to train on.")
    objective: NamedTable = Field(default=Named(name="dpo"), description="Training objective.")
    adapter: Literal["inherit"] | dict[str, Any] | None = Field(
        default="inherit", description="As model.adapter; inherit uses that one."
    )
    training: Training = TRAINING


class SubsetTable(Settings):
    """Comparisons that a scorer selects as training data of an auxiliary model."""

    scorer: NamedTable = Field(
        default=Named(name="log_ratio"),
        description="Scores the tokens; it may read any model that exists before this auxiliary model is trained.",
    )
    side: Literal["chosen", "rejected", "both"] = Field(
        default="chosen",
        description="Which responses are scored. That side is trained as the preferred one; with both, swap_labels decides.",
    )
    pair_score: Literal["largest", "mean", "sum"] = Field(
        default="largest", description="Reduces the token scores of a comparison to one number."
    )
    fraction: Share | None = Field(
        default=None,
        description="Fraction of the training comparisons to select, highest scores first. Excludes count.",
    )
    count: Count | None = Field(
        default=None, description="Number of comparisons to select, highest scores first. Excludes fraction."
    )
    alone: bool = Field(
        default=False,
        description="Train on the subset only, without the auxiliary model's own fraction.",
    )


class AuxiliaryModelTable(Settings):
    """A further model that scorers can read by its name."""

    model: str | None = Field(default=None, description="Folder or hub name; null uses the reference.")
    prompt: str | None = Field(
        default=None,
        description="Text with {prompt} that replaces the last user turn; null leaves it unchanged.",
    )
    training: Annotated[dict[str, Any] | None, BeforeValidator(training_table)] = Field(
        default=None,
        description="Train it, with these fields of transformers.TrainingArguments; null uses model as it is.",
    )
    objective: NamedTable = Field(default=Named(name="dpo"), description="Training objective.")
    swap_labels: bool = Field(default=False, description="Train with chosen and rejected responses swapped.")
    fraction: Share = Field(default=1.0, description="Fraction of the training comparisons to train on.")
    subset: SubsetTable | None = Field(
        default=None, description="Comparisons that a scorer selects to train on; null means none."
    )
    adapter: Literal["inherit"] | dict[str, Any] | None = Field(
        default="inherit", description="As model.adapter; inherit uses that one."
    )


class ScoresTable(Settings):
    """One stored score per response token."""

    scorer: NamedTable = Field(default=Named(name="log_ratio"), description="Scores the tokens.")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Data type of the forward pass."
    )
    tokens_per_batch: Count = Field(default=8192, description="Maximum number of tokens per forward pass.")
    shard_rows: Count = Field(
        default=128, description="Prompts per file of the store; a stopped stage resumes at the next file."
    )


class PolicyTable(Settings):
    """The model that the run produces."""

    model: str | None = Field(default=None, description="Model to start from; null uses the recipe's model.")
    selection: NamedTable = Field(
        default=Named(name="top_fraction"), description="Turns scores into token weights."
    )
    objective: NamedTable = Field(default=Named(name="sepo"), description="Training objective.")
    training: Training = TRAINING


class EvalRewardTable(Settings):
    """A second oracle, trained on separate comparisons, that evaluates the policy."""

    fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.3, description="Fraction of the training comparisons reserved for it."
    )
    objective: NamedTable = Field(default=Named(name="dpo"), description="Training objective.")
    training: Training = TRAINING


class EvaluationTable(Settings):
    """What is measured on the eval rows."""

    prompts: Count = Field(default=128, description="Eval prompts to generate replies for.")
    max_new_tokens: Count = Field(default=64, description="Maximum length of a reply, in tokens.")
    temperature: Positive = Field(
        default=1.0, description="Sampling temperature; use top_k 1 for greedy decoding."
    )
    top_p: Share = Field(default=1.0, description="Nucleus sampling: probability mass to sample from.")
    top_k: NotNegative = Field(
        default=0, description="Number of most likely tokens to sample from; 0 is all."
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Data type for generating replies; bfloat16 is faster on most GPUs.",
    )
    metrics: list[str] = Field(default=[], description="Metrics of the generated text, by name.")
    bootstrap: Count = Field(default=2000, description="Bootstrap resamples per confidence interval.")
    batch: Count = Field(default=64, description="Replies generated per batch.")


class Recipe(Settings):
    """A whole run."""

    run: str = Field(
        default="runs/recipe",
        description="Folder of the run; defaults to runs/ and the name of the recipe file.",
    )
    seed: NotNegative = Field(default=0, description="Random seed.")
    fixed_prompts: NotNegative = Field(
        default=8,
        description="Eval prompts to answer during training: at the start, at each evaluation and at the end. 0 turns it off.",
    )
    model: ModelTable = Field(default=ModelTable(), description="The model to start from.")
    data: DataTable = Field(default=DataTable(), description="The comparisons.")
    tokens: TokensTable = Field(default=TokensTable(), description="How text becomes tokens.")
    sft: SftTable | None = Field(default=None, description="Supervised fine-tuning first; null skips it.")
    oracle: OracleTable = Field(default=OracleTable(), description="The model that estimates token rewards.")
    auxiliary_models: dict[str, AuxiliaryModelTable] = Field(
        default={}, description="Further models that scorers can read, by name."
    )
    reward: RewardTable = Field(
        default=RewardTable(), description="The token reward model, if a scorer reads it."
    )
    scores: ScoresTable = Field(default=ScoresTable(), description="The token scores.")
    policy: PolicyTable = Field(default=PolicyTable(), description="The model that the run produces.")
    eval_reward: EvalRewardTable | None = Field(
        default=None, description="A second oracle for evaluation; null skips it."
    )
    examples: ExamplesTable | None = Field(
        default=None, description="Prompts, with optional references, of an online run."
    )
    prompt_task: PromptTaskTable | None = Field(
        default=None, description="Classification with a discrete prompt, in an online run."
    )
    online: OnlineTable | None = Field(
        default=None,
        description="Alternately learn a reward from ranked samples and train with it; null is a run on comparisons.",
    )
    evaluation: EvaluationTable = Field(default=EvaluationTable(), description="What is measured.")


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
    for key, field in table.model_fields.items():
        path = (*prefix, key)
        yield ".".join(path), field
        inner, named = table_of(field), named_table_of(field)
        if inner is not None:
            yield from schema_fields(inner, path)
        if named is not None:
            yield from schema_fields(named, (*path, ANY_NAME))
