"""Recipes: one YAML file, one table per stage, every value checked before anything runs."""

from tokenward.config.base import Named, Table
from tokenward.config.guidance import (
    ExamplesTable,
    GuidanceTable,
    PromptTaskTable,
    RewardTable,
    SamplingTable,
)
from tokenward.config.loading import LoadedRecipe, Resolved, load_recipe, parse_recipe, resolved
from tokenward.config.schema import (
    REMOVED,
    DataTable,
    EvalTable,
    EvaluationTable,
    ExpertTable,
    ModelTable,
    OracleTable,
    PicksTable,
    PolicyTable,
    Recipe,
    RefereeTable,
    ScoresTable,
    SftTable,
    TokensTable,
    descriptions,
)
from tokenward.config.source import Lines
from tokenward.config.training import check_training
from tokenward.config.unused import check_unused

__all__ = [
    "REMOVED",
    "DataTable",
    "EvalTable",
    "EvaluationTable",
    "ExamplesTable",
    "ExpertTable",
    "GuidanceTable",
    "Lines",
    "LoadedRecipe",
    "ModelTable",
    "Named",
    "OracleTable",
    "PicksTable",
    "PolicyTable",
    "PromptTaskTable",
    "Recipe",
    "RefereeTable",
    "Resolved",
    "RewardTable",
    "SamplingTable",
    "ScoresTable",
    "SftTable",
    "Table",
    "TokensTable",
    "check_training",
    "check_unused",
    "descriptions",
    "load_recipe",
    "parse_recipe",
    "resolved",
]
