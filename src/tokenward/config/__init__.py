"""Recipes: one YAML file, one table per stage, every value checked before anything runs."""

from tokenward.config.loading import LoadedRecipe, Resolved, load_recipe, parse_recipe, resolved
from tokenward.config.schema import (
    REMOVED,
    DataTable,
    EvaluationTable,
    ModelTable,
    Named,
    OracleTable,
    PolicyTable,
    Recipe,
    RefereeTable,
    ScoresTable,
    SftTable,
    Table,
    TokensTable,
    descriptions,
)
from tokenward.config.source import Lines
from tokenward.config.training import check_training

__all__ = [
    "REMOVED",
    "DataTable",
    "EvaluationTable",
    "Lines",
    "LoadedRecipe",
    "ModelTable",
    "Named",
    "OracleTable",
    "PolicyTable",
    "Recipe",
    "RefereeTable",
    "Resolved",
    "ScoresTable",
    "SftTable",
    "Table",
    "TokensTable",
    "check_training",
    "descriptions",
    "load_recipe",
    "parse_recipe",
    "resolved",
]
