"""Recipes: one YAML file with a table per stage, validated before anything runs."""

from tokenward.config.base import Named, Settings
from tokenward.config.online import (
    ExamplesTable,
    OnlineTable,
    PromptTaskTable,
    RewardTable,
    RolloutSettings,
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
    "RolloutSettings",
    "SamplingTable",
    "ScoresTable",
    "Settings",
    "SftTable",
    "SubsetTable",
    "TokensTable",
    "check_training",
    "check_unused",
    "load_recipe",
    "parse_recipe",
    "resolved",
]
