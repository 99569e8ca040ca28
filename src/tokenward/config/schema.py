"""The tables of a recipe: every key, its default, what it may hold and one line on what it does."""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BeforeValidator, Field
from pydantic.fields import FieldInfo

from tokenward.config.base import TRAINING, Count, Named, NamedTable, Share, Table, Training, training_table
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
"""Keys of an earlier version, and what they are called now. An entry stays for two minor releases."""


class ModelTable(Table):
    """The model a run starts from, and how it is held."""

    name: str = Field(
        default="default", description="Folder or hub name of the model; default is the built-in one."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Number type of the weights."
    )
    device: str = Field(default="auto", description="Where to compute: auto, cpu, cuda, cuda:1, mps.")
    attention: str = Field(default="sdpa", description="Attention implementation, as transformers names it.")
    packing: Literal["auto", "shared_prompts", "none"] = Field(
        default="auto",
        description="Compute a prompt once for all its responses (shared_prompts), or once for each (none).",
    )
    trust_remote_code: bool = Field(
        default=False, description="Run code that comes with a model from the hub."
    )
    adapter: dict[str, Any] | None = Field(
        default=None, description="Fields of peft.LoraConfig, as they are; null trains every weight."
    )
    head_mlp: dict[str, Any] | None = Field(
        default=None,
        description="Train a small network before a frozen model's head: hidden, gain, bias, residual.",
    )


class EvalTable(Table):
    """Comparisons that are held out, where they have a source or a split of their own."""

    source: str | list[str] | None = Field(
        default=None,
        description="As data.source; null is data.source itself, of which split names another part.",
    )
    split: str | None = Field(default=None, description="As data.split.")
    subset: str | None = Field(default=None, description="As data.subset.")
    limit: Count | None = Field(default=None, description="As data.limit.")
    format: str | None = Field(default=None, description="As data.format; null takes it from there.")
    columns: dict[str, str] | None = Field(
        default=None, description="As data.columns; null takes them from there."
    )


class DataTable(Table):
    """The comparisons, and which of them to use."""

    source: str | list[str] = Field(
        default="builtin", description="File, folder or hub name, or a list of files."
    )
    format: str = Field(
        default="auto", description="Name of the data format; auto finds it from the columns."
    )
    columns: dict[str, str] = Field(
        default={}, description="Our column name -> the column's name in the source."
    )
    split: str | None = Field(
        default=None, description="Split of a source with several; null is train, or the only one."
    )
    subset: str | None = Field(
        default=None, description="Folder inside the source, or configuration of a hub data set."
    )
    limit: Count | None = Field(default=None, description="Read only this many rows, the first ones.")
    eval: Annotated[float, Field(ge=0, lt=1)] | EvalTable = Field(
        default=0.1,
        description="Share of the prompts kept from training, for evaluation; or a table that names rows of their own.",
    )
    pairs: Literal["best_worst", "all", "adjacent"] = Field(
        default="best_worst",
        description="Which pairs to take where a prompt has more than two ranked responses.",
    )
    min_gap: float | None = Field(
        default=None, description="Drop pairs whose scores in the data lie closer than this."
    )


class TokensTable(Table):
    """From text to token ids."""

    template: Literal["chat", "plain"] = Field(
        default="chat", description="Use the chat template, or the bare text."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default={},
        description="Variables for the chat template, such as enable_thinking or a date; tools where no row has its own.",
    )
    max_prompt_tokens: Count = Field(default=1024, description="Longest prompt.")
    max_response_tokens: Count = Field(default=512, description="Longest response.")
    too_long: Literal["drop", "truncate", "error"] = Field(
        default="drop", description="What to do with what is longer."
    )
    processes: Count | None = Field(
        default=None,
        description="Processes that encode; null is one per core, fewer for little data. Changes no result.",
    )


class SftTable(Table):
    """Fine-tuning on the preferred responses before everything else."""

    training: Training = TRAINING


class OracleTable(Table):
    """The model that estimates token rewards, trained on a part of the comparisons."""

    model: str | None = Field(default=None, description="Model to start from; null is the recipe's model.")
    fraction: Share = Field(default=1.0, description="Share of the training comparisons it sees.")
    objective: NamedTable = Field(default=Named(name="dpo"), description="Objective it is trained with.")
    adapter: Literal["inherit"] | dict[str, Any] | None = Field(
        default="inherit", description="As model.adapter; inherit takes it from there."
    )
    training: Training = TRAINING


class SubsetTable(Table):
    """Comparisons that a scorer picks for an auxiliary model to train on."""

    scorer: NamedTable = Field(
        default=Named(name="log_ratio"),
        description="What gives the score of a token; it may read every model that is there before the auxiliary model trains.",
    )
    side: Literal["chosen", "rejected", "both"] = Field(
        default="chosen",
        description="Whose tokens are looked at. That side is trained as the better one; of both, as swapped says.",
    )
    pair_score: Literal["largest", "mean", "sum"] = Field(
        default="largest", description="From the scores of a comparison's tokens to one number."
    )
    fraction: Share | None = Field(
        default=None, description="Share of the training comparisons to pick, the highest scores; or count."
    )
    count: Count | None = Field(default=None, description="How many to pick, the highest; or fraction.")
    alone: bool = Field(
        default=False,
        description="Train on the picked ones alone, and not on the auxiliary model's own part as well.",
    )


class AuxiliaryModelTable(Table):
    """A further model whose values scorers may read under the auxiliary model's name."""

    model: str | None = Field(default=None, description="Folder or hub name; null is the reference.")
    prompt: str | None = Field(
        default=None,
        description="Text with {prompt} that it reads in place of the last user turn; null leaves that as it is.",
    )
    training: Annotated[dict[str, Any] | None, BeforeValidator(training_table)] = Field(
        default=None,
        description="Train it from model, with these fields of transformers.TrainingArguments; null uses it as it is.",
    )
    objective: NamedTable = Field(default=Named(name="dpo"), description="Objective it is trained with.")
    swap_labels: bool = Field(
        default=False, description="Train it with preferred and rejected responses exchanged."
    )
    fraction: Share = Field(default=1.0, description="Share of the training comparisons it sees.")
    subset: SubsetTable | None = Field(
        default=None, description="Comparisons that a scorer subset for it to train on; null is none."
    )
    adapter: Literal["inherit"] | dict[str, Any] | None = Field(
        default="inherit", description="As model.adapter; inherit takes it from there."
    )


class ScoresTable(Table):
    """One number per response token, stored."""

    scorer: NamedTable = Field(
        default=Named(name="log_ratio"), description="What gives the score of a token."
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Number type of the model's pass."
    )
    tokens_per_batch: Count = Field(default=8192, description="Most tokens in one pass.")
    shard_rows: Count = Field(
        default=128, description="Prompts in one file of the store; a stopped stage goes on at the next."
    )


class PolicyTable(Table):
    """The model that is the result."""

    model: str | None = Field(default=None, description="Model to start from; null is the recipe's model.")
    selection: NamedTable = Field(
        default=Named(name="top_fraction"), description="From scores to token weights."
    )
    objective: NamedTable = Field(default=Named(name="sepo"), description="Objective it is trained with.")
    training: Training = TRAINING


class EvalRewardTable(Table):
    """A second oracle on other comparisons, which judges the first and the policy."""

    fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.3, description="Share of the training comparisons that it alone sees."
    )
    objective: NamedTable = Field(default=Named(name="dpo"), description="Objective it is trained with.")
    training: Training = TRAINING


class EvaluationTable(Table):
    """What is measured on held-out prompts."""

    prompts: Count = Field(default=128, description="Held-out prompts to generate for.")
    max_new_tokens: Count = Field(default=64, description="Longest generated response.")
    temperature: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="Sampling temperature; top_k 1 always takes the likeliest token."
    )
    top_p: Share = Field(
        default=1.0, description="Sample from the likeliest tokens that hold this probability."
    )
    top_k: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Sample from this many tokens; 0 is all."
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Number type of the models that reply; bfloat16 is faster on most GPUs.",
    )
    metrics: list[str] = Field(default=[], description="Metrics of generated text, by name.")
    bootstrap: Count = Field(default=2000, description="Resamples behind a confidence interval.")
    batch: Count = Field(default=64, description="Responses generated at a time.")


class Recipe(Table):
    """A whole run."""

    run: str = Field(
        default="runs/recipe", description="Folder of the run; by default runs/ and the recipe's name."
    )
    seed: Annotated[int, Field(ge=0)] = Field(default=0, description="Seed of everything random.")
    fixed_prompts: Annotated[int, Field(ge=0)] = Field(
        default=8,
        description="Held-out prompts answered while a model trains: at its start, each evaluation and its end. 0 is none.",
    )
    model: ModelTable = Field(default=ModelTable(), description="The model to start from.")
    data: DataTable = Field(default=DataTable(), description="The comparisons.")
    tokens: TokensTable = Field(default=TokensTable(), description="From text to tokens.")
    sft: SftTable | None = Field(default=None, description="Fine-tuning first; null leaves it out.")
    oracle: OracleTable = Field(default=OracleTable(), description="The model that estimates token rewards.")
    auxiliary_models: dict[str, AuxiliaryModelTable] = Field(
        default={}, description="Further models for scorers to read, by name."
    )
    reward: RewardTable = Field(
        default=RewardTable(), description="The token reward model, where something reads a reward."
    )
    scores: ScoresTable = Field(default=ScoresTable(), description="One number per token.")
    policy: PolicyTable = Field(default=PolicyTable(), description="The model that is the result.")
    eval_reward: EvalRewardTable | None = Field(
        default=None, description="A second oracle; null leaves it out."
    )
    examples: ExamplesTable | None = Field(
        default=None, description="Prompts with references, to sample replies to, in an online run."
    )
    prompt_task: PromptTaskTable | None = Field(
        default=None, description="Labelled texts that a discrete prompt shall classify, in an online run."
    )
    online: OnlineTable | None = Field(
        default=None,
        description="Learn a reward from ranked samples and train with it, in turns; null is a run on comparisons.",
    )
    evaluation: EvaluationTable = Field(default=EvaluationTable(), description="What is measured.")


def table_of(field: FieldInfo) -> type[Table] | None:
    """The class of the table that a field holds, or None if it holds a value or tables by names of one's own."""
    if get_origin(field.annotation) is dict:
        return None
    return _table_in((field.annotation, *get_args(field.annotation)))


def named_table_of(field: FieldInfo) -> type[Table] | None:
    """The class of the tables that a field holds by names of one's own, or None."""
    return _table_in(get_args(field.annotation)) if get_origin(field.annotation) is dict else None


def _table_in(kinds: Iterable[Any]) -> type[Table] | None:
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Table)), None)


ANY_NAME = "NAME"
"""Stands in dotted keys of the schema for a name of one's own."""


def schema_fields(
    table: type[Table] = Recipe, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[str, FieldInfo]]:
    """Every key of a recipe with its dotted path, tables before what they hold."""
    for key, field in table.model_fields.items():
        path = (*prefix, key)
        yield ".".join(path), field
        inner, named = table_of(field), named_table_of(field)
        if inner is not None:
            yield from schema_fields(inner, path)
        if named is not None:
            yield from schema_fields(named, (*path, ANY_NAME))


def descriptions() -> dict[str, str]:
    """One line on every key of a recipe, by dotted path."""
    return {key: field.description or "" for key, field in schema_fields()}
