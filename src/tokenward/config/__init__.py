"""Recipes: one YAML file, one table per stage, every value checked before anything runs."""

from tokenward.config.base import Named, Table
from tokenward.config.online import (
    ExamplesTable,
    OnlineTable,
    PromptTaskTable,
    RewardTable,
    SamplingTable,
)
from tokenward.config.schema import (
    RENAMED,
    AuxiliaryModelTable,
    DataTable,
    EvalRewardTable,
    EvalTable,
    EvaluationTable,
    ModelTable,
    OracleTable,
    PolicyTable,
    Recipe,
    ScoresTable,
    SftTable,
    SubsetTable,
    TokensTable,
    descriptions,
)
from tokenward.config.source import Lines, LoadedRecipe, Resolved, load_recipe, parse_recipe, resolved
from tokenward.config.training import check_training
from tokenward.config.unused import check_unused

__all__ = [
    "RENAMED",
    "AuxiliaryModelTable",
    "DataTable",
    "EvalRewardTable",
    "EvalTable",
    "EvaluationTable",
    "ExamplesTable",
    "Lines",
    "LoadedRecipe",
    "ModelTable",
    "Named",
    "OnlineTable",
    "OracleTable",
    "PolicyTable",
    "PromptTaskTable",
    "Recipe",
    "Resolved",
    "RewardTable",
    "SamplingTable",
    "ScoresTable",
    "SftTable",
    "SubsetTable",
    "Table",
    "TokensTable",
    "check_training",
    "check_unused",
    "descriptions",
    "load_recipe",
    "parse_recipe",
    "resolved",
]
