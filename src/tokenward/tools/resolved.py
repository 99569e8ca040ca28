"""Every setting of a recipe, those included that only the named objects know."""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from tokenward.config import LoadedRecipe, Named, Resolved, resolved
from tokenward.objectives import OBJECTIVES, objective_of
from tokenward.plugins import build, find
from tokenward.sampling.sources import SOURCES
from tokenward.scoring.scorers import SCORERS
from tokenward.selection import SELECTORS, selector_of
from tokenward.stages.scorers import made_scorer
from tokenward.stages.tasks import SAMPLERS
from tokenward.training.arguments import DEFAULTS, TokenTrainingArguments

NAMED: dict[str, Mapping[str, Any]] = {
    "oracle.objective": OBJECTIVES,
    "scores.scorer": SCORERS,
    "policy.selection": SELECTORS,
    "policy.objective": OBJECTIVES,
    "eval_reward.objective": OBJECTIVES,
    "reward.objective": OBJECTIVES,
    "online.selection": SELECTORS,
    "online.objective": OBJECTIVES,
    "online.source": SOURCES,
    "online.sampler": SAMPLERS,
}
"""Tables of a recipe that name an object, and the built-in ones."""

TRAINED = ("sft", "oracle", "policy", "eval_reward")
"""Tables whose ``training`` has the defaults of this module; the reward and an online policy have the published code's."""


def completely_resolved(loaded: LoadedRecipe) -> list[Resolved]:
    """Every value of a recipe in the order of the schema, with its origin, defaults of named objects included.

    Of a ``training`` table what tokenward sets itself is listed; everything else there is as in transformers.

    Raises:
        UserError: a name or a setting of an object is wrong.
    """
    items = resolved(loaded)
    known = {item.key for item in items}
    added: dict[str, list[Resolved]] = {}
    for table, objects in NAMED.items():
        if f"{table}.name" in known:
            found = _of_object(loaded, table, objects)
            added[table] = [item for item in found if not _covered(item.key, known)]
    for table in TRAINED:
        if getattr(loaded.recipe, table) is not None:
            where = f"{table}.training"
            found = [Resolved(f"{where}.{key}", value, "default") for key, value in _training().items()]
            added[where] = [item for item in found if item.key not in known]
    return list(_joined([item for item in items if item.key not in added], added))


def _covered(key: str, known: set[str]) -> bool:
    """Whether a key or a table around it was written."""
    parts = key.split(".")
    return any(".".join(parts[:end]) in known for end in range(1, len(parts) + 1))


def _joined(items: list[Resolved], added: Mapping[str, list[Resolved]]) -> Iterator[Resolved]:
    """Each table's further values after its own; those of an empty table at the end of what stands around it."""
    left = dict(added)
    for number, item in enumerate(items):
        yield item
        following = items[number + 1].key if number + 1 < len(items) else ""
        outer = item.key.split(".")[0]
        for table in list(left):
            inside = item.key.startswith(f"{table}.") and not following.startswith(f"{table}.")
            ends = table.split(".")[0] == outer and following.split(".")[0] != outer
            if inside or ends:
                yield from left.pop(table)


def _of_object(loaded: LoadedRecipe, table: str, objects: Mapping[str, Any]) -> list[Resolved]:
    outer, _, inner = table.partition(".")
    named = getattr(getattr(loaded.recipe, outer), inner)
    kind = inner.replace("_", " ")
    target = find(kind, named.name, objects)
    if dataclasses.is_dataclass(target):
        values = dataclasses.asdict(_made(kind, named, objects, loaded.recipe.seed))
    elif inspect.isclass(target):
        parameters = inspect.signature(target).parameters.values()
        values = {
            item.name: item.default for item in parameters if item.default is not inspect.Parameter.empty
        }
    else:
        values = {}  # a function is called as it is
    return [Resolved(key, value, loaded.lines.origin(key)) for key, value in _leaves(values, table)]


def _made(kind: str, named: Named, objects: Mapping[str, Any], seed: int) -> Any:
    """The object; the seed of one that draws is the recipe's unless it has one."""
    if objects is SELECTORS:
        return selector_of(named, seed)
    if objects is OBJECTIVES:
        return objective_of(kind, named, seed)
    return (
        made_scorer(named, seed) if objects is SCORERS else build(kind, named.name, named.arguments, objects)
    )


def _leaves(values: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}.{key}")
        else:
            yield f"{path}.{key}", value


def _training() -> dict[str, Any]:
    ours = (
        "tokens_per_forward",
        "disable_dropout",
        "checkpoint_minutes",
        "displacement_margin",
        "log_entropy",
    )
    fields = {item.name: item.default for item in dataclasses.fields(TokenTrainingArguments)}
    return {**DEFAULTS, **{name: fields[name] for name in ours}}
