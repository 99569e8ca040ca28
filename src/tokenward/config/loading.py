"""Recipe text and overrides -> a checked recipe, with messages that name the line and the nearest key."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from tokenward.config.problems import either, nearest, renamed_keys, show, unknown_keys, wrong_values
from tokenward.config.schema import Recipe
from tokenward.config.source import Lines, apply_override, read_source
from tokenward.errors import UserError

_LEAST = "model:\n  name: default\ndata:\n  source: builtin"


class LoadedRecipe(NamedTuple):
    """A recipe and where its keys were written."""

    recipe: Recipe
    lines: Lines


class Resolved(NamedTuple):
    """One value of a recipe, and where it comes from: ``default``, ``file:line`` or ``--set``."""

    key: str
    value: Any
    origin: str


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe file, apply ``a.b=value`` overrides and check everything.

    Raises:
        UserError: no such file, malformed YAML, an unknown key or a wrong value.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(_missing_message(Path(path))) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: this is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    return parse_recipe(text, str(path), overrides)


def parse_recipe(text: str, name: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Check a recipe given as text; messages and the default run folder call it ``name``."""
    values, numbers = read_source(text, name)
    if values is None:
        raise UserError(f"{name}: the recipe is empty. Write at least:\n{_LEAST}")
    if not isinstance(values, dict):
        raise UserError(f"{name}:1: a recipe is a table, got {show(values)}. Write at least:\n{_LEAST}")
    lines = Lines(name, numbers)
    for override in overrides:
        lines = apply_override(values, lines, override)
    return LoadedRecipe(_checked(values, lines), lines)


def resolved(loaded: LoadedRecipe) -> list[Resolved]:
    """Every value of a recipe in the order of the schema, with its origin."""
    leaves = _leaves(loaded.recipe.model_dump(), ())
    return [Resolved(key, value, loaded.lines.origin(key)) for key, value in leaves]


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    else:
        yield ".".join(path), value


def _missing_message(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder, not a recipe. Name a .yaml file in it."
    folder = path.parent if path.parent.is_dir() else Path()
    found = {
        p.name: p
        for pattern in ("*.yaml", "*.yml")
        for p in (*folder.glob(pattern), *Path("recipes").glob(pattern))
    }
    close = nearest(path.name, sorted(found))
    advice = (
        f"Did you mean {found[close[0]]}?"
        if close
        else f"Recipes near it: {either(sorted(found)) or 'none'}."
    )
    return f"There is no recipe {path}. {advice}"


def _checked(values: dict[str, Any], lines: Lines) -> Recipe:
    problems = [*renamed_keys(values)] or [*unknown_keys(values)]
    if not problems:
        values.setdefault("run", f"runs/{Path(lines.name).stem}")
        try:
            return Recipe.model_validate(values)
        except ValidationError as error:
            problems = [*wrong_values(error, values)]
    problems.sort(key=lambda problem: lines.line_of(problem.key) or 0)
    raise UserError("\n".join(f"{lines.where(key)}: {message}" for key, message in problems))
