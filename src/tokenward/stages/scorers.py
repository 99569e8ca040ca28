"""The scorers that a recipe names."""

from tokenward.config import Named
from tokenward.plugins import build, check_call
from tokenward.scoring.scorers import SCORERS, Scorer, check_scope, seeded
from tokenward.stages.run import Run


def scorer_of(run: Run) -> Scorer:
    """The scorer that the recipe names for the scores."""
    return made_scorer(run.recipe.scores.scorer, run.recipe.seed)


def made_scorer(table: Named, seed: int = 0) -> Scorer:
    """The scorer that a table of a recipe names. One that draws has the recipe's seed unless it has its own.

    Raises:
        UserError: there is none, its settings are wrong, or it says that it must see several responses at once.
    """
    arguments = seeded({"name": table.name, **table.arguments}, seed)
    del arguments["name"]
    scorer = build("scorer", table.name, arguments, SCORERS)
    check_call("scorer", table.name, scorer, ("record",))
    check_scope(scorer)
    return scorer
