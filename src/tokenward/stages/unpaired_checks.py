"""Refuses what cannot train on rows of one response, when the data are known and before a model is loaded."""

from collections.abc import Callable, Iterator, Sequence

from tokenward.config import Named
from tokenward.errors import UserError
from tokenward.objectives import needs_of, objective_of
from tokenward.stages.run import AUXILIARY, Run

OBJECTIVES_FOR_ALONE = "{name: kto} or {name: weighted_likelihood}"
WITHOUT_ORACLE = "scores: {scorer: {name: surprisal}}"
"""A scorer that reads the reference alone."""


def check_unpaired(run: Run, stages: Sequence[str]) -> None:
    """Refuse stages that need two responses where some rows of the data have one.

    Args:
        run: Its data stage is finished.
        stages: The stages that will be carried out.

    Raises:
        UserError: says which stage, and what to write.
    """
    facts = run.done("data").facts
    count = sum(facts["unpaired"].values())
    if not count:
        return
    total = facts["train"] + facts["eval"]
    some = f"{count} of {total} rows have one response each (unpaired rows)"
    for stage in stages:
        for problem in _problems(run, stage):
            raise UserError(f"{some}, and {problem}")


def _problems(run: Run, stage: str) -> Iterator[str]:
    recipe = run.recipe
    if stage == "reward":
        yield (
            "a reward is learned from ranks among several responses. Give ranked responses, or write a scorer that reads no "
            f"reward, such as {WITHOUT_ORACLE}."
        )
    elif stage == "oracle":
        yield from _of_objective("oracle", recipe.oracle.objective, _without_oracle)
    elif stage == "policy":
        yield from _of_objective("policy", recipe.policy.objective, _plain)
    elif stage == "eval_reward" and recipe.eval_reward is not None:
        yield from _of_objective("eval_reward", recipe.eval_reward.objective, _plain)
    elif stage.startswith(AUXILIARY):
        name = stage.removeprefix(AUXILIARY)
        table = recipe.auxiliary_models[name]
        yield from _of_objective(f"auxiliary_models.{name}", table.objective, _plain)
        if table.swap_labels or table.subset is not None:
            yield (
                f"the auxiliary model {name} exchanges or picks pairs (swapped, picks). Leave these keys out, or give pairs."
            )


def _of_objective(key: str, table: Named, advice: Callable[[str], str]) -> Iterator[str]:
    if needs_of(objective_of("objective", table)).unpaired:
        return
    if ":" in table.name:
        yield (
            f'the objective of {key}, {table.name}, does not say that it trains on such rows. Write needs = Needs(unpaired="all") in its '
            f"class if it does. {advice(key)}"
        )
    else:
        yield f"the objective of {key}, {table.name}, compares responses to one prompt. {advice(key)}"


def _plain(key: str) -> str:
    return f"Write {key}.objective: {OBJECTIVES_FOR_ALONE}, or give pairs."


def _without_oracle(key: str) -> str:
    return (
        f"Write {key}.objective: {{name: kto}}, or do without an oracle: {WITHOUT_ORACLE}, with "
        "policy: {selection: {name: all}} where every token shall train."
    )
